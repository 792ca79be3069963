"""Weights by reference: mapped where they lie in one run, assembled once, refused before they are read."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.engines.sessions.loading import load_weights
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export import free_memory
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.errors import BackendError


@pytest.fixture(scope="module")
def referring(small_v2, bundle_of):
    return bundle_of(small_v2.checkpoint, page_size=8, by_reference=True)


def test_plain_tensors_are_mapped_and_all_have_the_exported_numbers(small_v2, bundle_of, referring):
    written = WeightReader(bundle_of(small_v2.checkpoint, page_size=8))
    reader, seen = WeightReader(referring), []
    arrays = load_weights(referring, mapped=True, progress=lambda done, total: seen.append((done, total)))
    kinds = {name.rsplit(".", 1)[-1] for name in reader.assembled if ".experts." not in name}
    assert kinds == {"w_uk", "w_uv"}
    assert arrays.keys() == written.records.keys()
    for name, array in arrays.items():
        assert array.flags.writeable == (name in reader.assembled)
        np.testing.assert_array_equal(array, written.array(name), err_msg=name)
    total = sum(map(reader.nbytes, reader.assembled))
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("kind", [OrtSession, TorchSession])
def test_what_does_not_fit_is_refused_before_it_is_read(referring, monkeypatch, kind):
    monkeypatch.setattr(free_memory, "available_memory", lambda: 2**16)
    with pytest.raises(BackendError, match=r"0\.00 GB are free: (export without|use --backend ort)"):
        kind(referring, 4)


def test_control_groups_leave_what_their_files_say(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\nactive_file 50\n")
    assert list(free_memory.group_leaves(tmp_path)) == [450]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(free_memory.group_leaves(tmp_path)) == []
    assert list(free_memory.group_leaves(tmp_path / "none")) == []
