"""Bundles to validate, and faults to plant in copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.validate.cases import long_cases
from deepseek_trt.validate.independent import oracle

PAGE = 8
Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _not_by_transformers():
    """Too large for transformers: tests/inputs/test_independent.py runs it, the others need not wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "MOST_PARAMETERS", 0)
        yield


@pytest.fixture
def little_greed(monkeypatch) -> None:
    """Two generated tokens instead of 33, for tests of what every step shows."""
    monkeypatch.setattr(long_cases, "GREEDY_STEPS", 1)


@pytest.fixture(scope="session")
def good(small_v2, bundle_of) -> Callable[[str], Bundle]:
    """A right bundle of the dtype."""
    return lambda dtype: bundle_of(small_v2.checkpoint, dtype=dtype, page_size=PAGE)


@pytest.fixture(scope="session")
def biased_checkpoint(small_v2, tmp_path_factory) -> Path:
    """The small model with the V3 family's router: a correction bias, sigmoid scores, normalised weights."""
    path = tmp_path_factory.mktemp("v3") / "checkpoint"
    shutil.copytree(small_v2.checkpoint, path)
    changed = {"model_type": "deepseek_v3", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    raw = {**small_v2.raw, **changed, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    (path / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    save_file({name: 0.1 * torch.randn(16, generator=generator) for name in names}, path / "bias.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(names, "bias.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="session")
def biased(biased_checkpoint, bundle_of) -> Callable[[str], Bundle]:
    """A right bundle of the dtype, of the V3 family."""
    return lambda dtype: bundle_of(biased_checkpoint, dtype=dtype, page_size=PAGE)


@pytest.fixture
def edited(good, relist, tmp_path) -> Callable[..., Path]:
    """A copy of the float32 bundle, or of another, with one graph, or both, changed."""

    def make(edit: Edit, *graphs: str, bundle: Bundle | None = None) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree((bundle or good("float32")).path, copy)
        for name in graphs:
            model = onnx.load(copy / f"{name}.onnx", load_external_data=False)
            edit(model)
            onnx.save(model, copy / f"{name}.onnx")
        return relist(copy).path

    return make


@pytest.fixture
def with_changed_weight(good, tmp_path) -> Callable[[str], Path]:
    """A copy of the float32 bundle with the first number of one tensor changed."""

    def make(tensor: str) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(good("float32").path, copy)
        file = copy / WEIGHTS_FILE
        place = next(t for t in read_header(file) if t.name == tensor)
        numbers = np.memmap(file, dtype=np.float32, mode="r+", offset=place.offset, shape=(place.nbytes // 4,))
        numbers[0] += 0.25
        numbers.flush()
        return copy

    return make
