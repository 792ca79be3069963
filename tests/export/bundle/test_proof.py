"""That weights are those that export wrote is found out once, and again when the file changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deepseek_trt.export.bundle import proof
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.trust import cache


@pytest.fixture
def hashed(tmp_path, monkeypatch) -> list[Path]:
    """The folders whose weights were hashed so far, with a cache of its own."""
    seen: list[Path] = []
    real = proof._hash_all

    def hash_all(folder, *rest):
        seen.append(folder)
        real(folder, *rest)

    monkeypatch.setattr(proof, "_hash_all", hash_all)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(cache, "_said", set())
    forget(monkeypatch)
    return seen


def forget(monkeypatch) -> None:
    """What another process does not know."""
    monkeypatch.setattr(proof, "_proven", set())


@pytest.fixture
def bundle(small_v2, bundle_of, tmp_path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle_of(small_v2.checkpoint).path, tmp_path / "bundle")))


def spoil(bundle: Bundle, keep_time: bool = True) -> None:
    file = bundle.path / WEIGHTS_FILE
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(before.st_size - 1)
        last = stream.read(1)
        stream.seek(before.st_size - 1)
        stream.write(bytes([last[0] ^ 1]))
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def marks(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "caches" / "deepseek-trt" / "weights").glob("*.json"))


def test_weights_are_hashed_once(bundle, hashed, monkeypatch, tmp_path):
    for _ in range(3):
        WeightReader(bundle)
        forget(monkeypatch)
    assert hashed == [bundle.path]
    assert len(marks(tmp_path)) == 1


def test_export_knows_what_it_wrote(small_v2, hashed, monkeypatch, tmp_path):
    bundle = export_bundle(ExportRequest(small_v2.checkpoint, tmp_path / "out")).bundle
    forget(monkeypatch)
    WeightReader(bundle)
    assert hashed == []
    Bundle.open(bundle.path, verify=True)
    assert hashed == [bundle.path]


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_change_is_found_whether_the_time_is_put_back_or_not(bundle, hashed, monkeypatch, keep_time):
    WeightReader(bundle)
    spoil(bundle, keep_time)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"the weight .* is not what export wrote"):
            WeightReader(bundle)
        forget(monkeypatch)
    with pytest.raises(BundleError, match="is not what export wrote"):
        Bundle.open(bundle.path, verify=True)


def test_a_touched_file_is_hashed_again_and_taken(bundle, hashed):
    WeightReader(bundle)
    os.utime(bundle.path / WEIGHTS_FILE)
    WeightReader(bundle)
    WeightReader(bundle)
    assert len(hashed) == 2


def test_a_moved_bundle_is_hashed_again(bundle, hashed, tmp_path):
    WeightReader(bundle)
    WeightReader(Bundle.open(bundle.path.rename(tmp_path / "moved")))
    assert len(hashed) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 1}', "null", '{"schema": 1, "size": "x"}'])
def test_a_damaged_mark_counts_for_nothing(bundle, hashed, monkeypatch, tmp_path, content):
    WeightReader(bundle)
    marks(tmp_path)[0].write_text(content)
    for _ in range(2):
        forget(monkeypatch)
        WeightReader(bundle)
    assert len(hashed) == 2


def test_without_a_cache_each_process_hashes_once_and_says_so(bundle, hashed, monkeypatch, caplog, tmp_path):
    (tmp_path / "caches").write_text("no folder")
    for _ in range(2):
        WeightReader(bundle)
        WeightReader(bundle)
        forget(monkeypatch)
    assert len(hashed) == 2
    assert len([r for r in caplog.records if "each process hashes them once" in r.getMessage()]) == 1


def test_progress_ends_with_all_bytes(bundle, hashed):
    seen: list[tuple[int, int]] = []
    WeightReader(bundle, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_by_reference_there_is_no_hash_and_that_is_said(small_v2, bundle_of, hashed, caplog):
    bundle = bundle_of(small_v2.checkpoint, by_reference=True)
    WeightReader(bundle)
    assert caplog.records == []
    Bundle.open(bundle.path, verify=True)
    assert hashed == []
    assert "checked by size and time alone" in caplog.text


def test_who_judges_weights_reads_them_as_they_are(bundle, hashed):
    spoil(bundle)
    WeightReader(Bundle.open(bundle.path, judges_weights=True))
    assert hashed == []
