"""Prefill and decode with every custom op evaluated by its Triton kernel, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.ops.torch_ops import TORCH_OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS

TABLE = np.array([[1, 3, 5], [2, 4, 6]], dtype=np.int32)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the ops whose kernels were called, in order."""
    seen: list[str] = []
    for name, run in list(KERNEL_OPS.items()):
        monkeypatch.setitem(KERNEL_OPS, name, lambda *args, name=name, run=run: (seen.append(name), run(*args))[1])
    return seen


def test_kernels_compute_what_torch_computes(good, calls):
    from deepseek_trt.validate.backends.kernels import KernelSession

    bundle = good("float32")
    kernels, reference = KernelSession(bundle, 8), TorchSession(bundle, 8)
    kernels.fill(float("nan"))
    ids = np.random.default_rng(0).integers(2, 256, (2, 13))
    lengths, none = np.array([13, 6], dtype=np.int32), np.zeros(2, np.int32)
    for run in (
        lambda s: s.prefill(ids, lengths, none, TABLE),
        lambda s: s.decode(ids[:, :1], np.ones_like(lengths), lengths, TABLE),
        lambda s: s.decode(ids[:, 1:3], np.full_like(lengths, 2), lengths + 1, TABLE),
    ):
        ours, theirs = run(kernels), run(reference)
        # float32 sums in another order: some hundred roundings of 2**-24 on the way through three layers
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    layers, sparse = bundle.manifest.model.num_hidden_layers, bundle.manifest.model.num_hidden_layers - 1
    assert [calls.count(name) for name in ("MlaPrefill", "MlaDecode")] == [layers, 2 * layers]
    assert [calls.count(name) for name in ("MoeRouter", "MoeExperts")] == [3 * sparse, 3 * sparse]


def test_elsewhere_the_references_run(good, calls):
    import deepseek_trt.validate.backends.kernels  # noqa: F401 (registers the kernels)

    TorchSession(good("float32"), 8).decode(np.array([[5]]), np.ones(1, np.int32), np.zeros(1, np.int32), TABLE[:1])
    assert calls == []
    assert set(KERNEL_OPS) <= set(TORCH_OPS)


@pytest.mark.slow
def test_the_shipped_model_passes(demo_checkpoint, bundle_of):
    bundle = bundle_of(demo_checkpoint).path
    done = CliRunner().invoke(main, ["validate", str(bundle), "--backend", "kernels"])
    assert done.exit_code == 0, done.output
