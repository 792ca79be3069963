"""Layer by layer gives the very same numbers, with one layer in memory."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.validate.backends import torch as torch_backend
from deepseek_trt.validate.backends.torch import StreamedTorchSession, torch_session


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_change_nothing(small_v2, bundle_of, by_reference, dtype):
    bundle = bundle_of(small_v2.checkpoint, dtype="bfloat16", page_size=8, by_reference=by_reference)
    ids = np.arange(10)[None]
    given = ids, np.array([10], np.int32), np.zeros(1, np.int32), np.array([[1, 2]], np.int32)
    whole, streamed = (kind(bundle, 4, dtype) for kind in (TorchSession, StreamedTorchSession))
    assert (whole.prefill(*given) == streamed.prefill(*given)).all()
    step = np.array([[7]]), np.ones(1, np.int32), np.array([10], np.int32), given[3]
    assert (whole.decode(*step) == streamed.decode(*step)).all()
    assert all((whole.pool(layer) == streamed.pool(layer)).all() for layer in range(3))
    assert all(p.is_meta for p in streamed.model.model.layers.parameters())


def test_memory_decides(good, monkeypatch):
    bundle = good("float32")
    assert type(torch_session(bundle, 4, "float32")) is TorchSession
    monkeypatch.setattr(torch_backend, "available_memory", lambda: 2**20)
    assert type(torch_session(bundle, 4, "float32")) is StreamedTorchSession


def test_pools_can_be_filled(good):
    session = torch_session(good("bfloat16"), 4, "bfloat16")
    session.fill(float("nan"))
    assert np.isnan(session.pool(2)).all()
