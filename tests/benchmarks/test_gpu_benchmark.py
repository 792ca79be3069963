"""benchmarks/gpu.py without a GPU: what a graph holds, how the cache is flushed, and which binaries are timed."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compiled_kernels  # noqa: E402  benchmarks are scripts, not a package
import gpu  # noqa: E402

from deepseek_trt.export.config.model_config import ModelConfig  # noqa: E402
from deepseek_trt.export.ops.mla_decode import mla_decode as decode_reference  # noqa: E402
from deepseek_trt.plugins.aot.records import Binary  # noqa: E402
from deepseek_trt.plugins.aot.variants import variants_for  # noqa: E402
from deepseek_trt.plugins.kernels import interpreter  # noqa: E402


class PlayedGpu:
    """Runs what it captures once more at each replay; a run takes as many seconds as it was told."""

    def __init__(self, seconds=()):
        self.done: list[str] = []
        self._seconds = iter(seconds)

    def capture(self, work):
        self.done.append("capture")
        work()
        return work

    def flush(self):
        self.done.append("flush")

    def seconds(self, work):
        work()
        return next(self._seconds)


def test_a_graph_holds_many_calls_that_take_turns():
    played = PlayedGpu([100.0, 4.0, 2.0, 6.0])
    calls = [lambda name=name: played.done.append(name) for name in "abc"]
    assert gpu.Timer(runs=3, warmup=1, gpu=played)(*calls) == 4.0 / gpu.CALLS
    one_graph = [*"abcabcabcabcabcabcab"]
    assert len(one_graph) == gpu.CALLS
    assert played.done == ["capture", *one_graph, *["flush", *one_graph] * 4]


def test_the_cache_is_flushed_by_reading(monkeypatch):
    """Written lines would have to go back to memory while the calls are timed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(L2_cache_size=2**10))
    stock = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: stock(*shape, **options))
    flushing = gpu.TorchGpu()
    assert flushing._read.nbytes >= 4 * 2**10
    before = flushing._read._version
    flushing.flush()
    assert flushing._read._version == before
    assert flushing._sum.numel() == 1


@pytest.mark.parametrize(
    ("nbytes", "cache", "free", "copies"),
    [(1e6, 50e6, 1e12, 20), (40e6, 50e6, 1e12, 4), (1e9, 50e6, 1e12, 2), (1e9, 50e6, 1.5e9, 1), (1e9, 50e6, 0, 1)],
)
def test_copies_exceed_the_cache_and_fit_the_memory(nbytes, cache, free, copies):
    assert gpu.copies_for(nbytes, int(cache), free) == copies
    if 1 < copies < gpu.CALLS:
        assert (copies - 1) * nbytes >= 2 * cache


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in this process")
def test_every_copy_is_computed(monkeypatch):
    interpreter.enable()
    work = gpu.decode_work(heads=4, context=130, batch=2, copies=3, device="cpu")
    assert len(work.calls) == 3
    for call in work.calls:
        call()
    for call in work.calls:
        query, pool, table, past, attended = call.operands
        newest = pool[table[:, -1].long(), int(past[0]) % gpu.PAGE][:, None]
        wide = (t.float() for t in (query, newest, pool))
        expected, _ = decode_reference(*wide, table, past, torch.ones_like(past), gpu.WIDTH**-0.5, gpu.RANK)
        torch.testing.assert_close(attended.float(), expected, atol=2e-2, rtol=2e-2)
    small = gpu.Experts("small", 4, 64, 32, 8, 2)
    work = gpu.experts_work(small, 5, gpu.expert_stacks(small, "cpu"), copies=2, device="cpu")
    for call in work.calls:
        call()
        assert call.operands[2].isfinite().all()


CONFIG = ModelConfig(n_routed_experts=0)


class Recorder:
    """A CUDA driver that keeps what is launched, parameters' bits included."""

    CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self):
        self.loaded, self.shared, self.launched = [], [], []

    def __getattr__(self, name):
        calls = {"cuModuleLoadData": self.load, "cuModuleGetFunction": self.function}
        return {**calls, "cuFuncSetAttribute": self.set_attribute, "cuLaunchKernel": self.launch}[name]

    def load(self, image):
        self.loaded.append(image)
        return 0, image

    def function(self, module, name):
        return 0, (module, name)

    def set_attribute(self, function, attribute, value):
        self.shared.append(value)
        return (0,)

    def launch(self, function, *how):
        *how, stream, params, _ = how
        pointers = (ctypes.c_void_p * 5).from_address(params)
        first = ctypes.c_uint64.from_address(pointers[0]).value
        self.launched.append((function[1], *how, stream, first))
        return (0,)


def test_what_is_timed_are_the_binaries_of_the_library(monkeypatch):
    """Of this chip's tiles, launched as they were compiled; afterwards the modules have Triton's kernels back."""

    def compile_all(config, dtype, sms, jobs, fallback):
        assert (list(sms), fallback) == ([90], False)
        return tuple(
            Binary(v, 90, False, v.kernel, 60_000, 999, v.kernel.encode(), hashlib.sha256(repr(v).encode()).hexdigest())
            for v in variants_for(config, dtype, 90)
        )

    monkeypatch.setattr(compiled_kernels, "compile_all", compile_all)
    if not torch.cuda.is_available():
        interpreter.enable()
    mla_decode = importlib.import_module("deepseek_trt.plugins.kernels.mla_decode")
    driver, stock = Recorder(), mla_decode.mla_decode_combine
    tensor = types.SimpleNamespace(is_cuda=True, is_contiguous=lambda: True, data_ptr=lambda: 0x7000)
    (row,) = [v for v in variants_for(CONFIG, "bfloat16", 90) if v.kernel == "mla_decode_combine"]
    with compiled_kernels.shipped_kernels(CONFIG, "bfloat16", 90, driver, lambda: 77):
        for _ in range(2):
            launch = mla_decode.mla_decode_combine[(3, 4)]
            launch(*[tensor] * 5, 8, 5, 6, 7, **dict(row.constexprs), num_warps=row.num_warps, num_stages=2)
        with pytest.raises(AssertionError, match="no binary has"):
            launch(*[tensor] * 5, 8, 5, 6, 7, BLOCK_S=1)
    assert driver.loaded == [b"mla_decode_combine\0"]
    assert driver.shared == [60_000]
    assert driver.launched == [(b"mla_decode_combine", 3, 4, 1, 999, 1, 1, 60_000, 77, 0x7000)] * 2
    assert mla_decode.mla_decode_combine is stock
