"""Bundles of small models of any configuration, and runs that reach every kernel of the compiled operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.session import Session

Logits = list[np.ndarray[Any, Any]]


@pytest.fixture(scope="session")
def weights() -> ModuleType:
    """tests/export/conftest.py, which draws checkpoints."""
    spec = importlib.util.spec_from_file_location("weights", Path(__file__).parents[2] / "export" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def decode_twice() -> Callable[[OrtSession], Logits]:
    def run(session: OrtSession) -> Logits:
        """A step of one token and one of several, of three rows whose caches hold random latents: their logits."""
        rng = np.random.default_rng(0)
        for layer in range(session.cache.layers):
            session.pool(layer)[:] = rng.standard_normal(session.pool(layer).shape) * 0.5
        table = rng.permutation(np.arange(1, 40, dtype=np.int32))[:36].reshape(3, 12)
        lengths = np.array([0, 9, 40], dtype=np.int32)
        ids, new = rng.integers(0, 60, (3, 5)), np.array([5, 1, 3], dtype=np.int32)
        one = session.decode(ids[:, :1], np.ones_like(new), lengths, table)
        several = session.decode(ids, new, lengths + 1, table)
        return [one[:, 0], *(row[:count] for row, count in zip(several, new, strict=True))]

    return run


@pytest.fixture(scope="session")
def prefill_all() -> Callable[[Session], Logits]:
    def run(session: Session) -> Logits:
        """Ragged rows: new ones, and ones after latents that fill several blocks, whose few or many new tokens are
        computed absorbed or expanded. What no row holds is NaN.
        """
        rng = np.random.default_rng(0)
        table = rng.permutation(np.arange(1, 450, dtype=np.int32))[: 5 * 80].reshape(5, 80)
        past, new = np.array([0, 9, 277, 230, 0], dtype=np.int32), np.array([40, 13, 3, 38, 1], dtype=np.int32)
        ids = rng.integers(0, 60, (5, 40))
        for layer in range(session.cache.layers):
            latents = rng.standard_normal((5, 320, session.cache.latent_dim)) * 0.5
            latents[np.arange(320) >= past[:, None]] = np.nan
            session.pool(layer)[:] = np.nan
            session.pool(layer)[table] = latents.reshape(5, 80, 4, -1)
        # The last page of a row is full of NaN and may be named beyond its end.
        wide = np.concatenate([table, np.full((5, 3), 451, np.int32)], axis=1)
        out = [session.prefill(ids, new, past, wide), session.decode(ids[:, :1], new // new, past + new, wide)[:, 0]]
        return [*out, session.prefill(ids[2:4], new[2:4], past[2:4] + new[2:4] + 1, wide[2:4, :80])]

    return run
