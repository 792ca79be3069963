"""Tolerances grow with depth and unit roundoff, and measured floors only ever tighten them."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.export.dtypes import UNIT_ROUNDOFF
from deepseek_trt.validate.numbers.tolerance import FLOOR_FACTOR, derive_tolerance, roundings_of, tighten


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_random_walk_of_roundings_stays_inside(dtype):
    # the bound is for R roundings one after the other: do just that to many numbers
    import torch

    rng, steps = torch.Generator().manual_seed(0), 100
    exact = torch.randn(4096, generator=rng, dtype=torch.float64)
    rounded = exact.to(getattr(torch, dtype))
    for _ in range(steps - 1):
        factor = 0.5 + torch.rand((), generator=rng, dtype=torch.float64)
        exact, rounded = exact * factor, (rounded.double() * factor).to(getattr(torch, dtype))
    error = float((rounded.double() - exact).abs().max() / exact.abs().max())
    bound = derive_tolerance(0, dtype, steps).relative
    assert bound / 20 < error < bound


def test_deeper_and_narrower_is_wider():
    shallow, deep = (derive_tolerance(64, "float32", roundings_of(n, 3)).relative for n in ("latents.0", "logits"))
    assert UNIT_ROUNDOFF["float32"] < shallow < deep < 1e-4
    assert deep < derive_tolerance(64, "float16", roundings_of("logits", 3)).relative < 0.02


def test_every_probe_has_roundings():
    from deepseek_trt.validate.backends.probes import PLACES

    depths = [roundings_of(f"{place}.1", 3) for place in PLACES if place != "router_ids"]
    assert min(depths) == roundings_of("hidden.1", 3)
    assert max(depths) < roundings_of("hidden.2", 3)


def test_a_floor_tightens_and_never_widens():
    derived = derive_tolerance(64, "float16", 10)
    assert tighten(derived, None) is derived
    wide = tighten(derived, derived.relative)
    assert wide.relative == derived.relative
    assert "would allow more" in wide.reason
    assert tighten(derived, 0.0) is derived
    tight = tighten(derived, derived.relative / 100)
    assert tight.relative == pytest.approx(FLOOR_FACTOR * derived.relative / 100)
    assert "floor" in tight.reason


def test_reasons_name_their_numbers():
    reason = derive_tolerance(2048, "bfloat16", 542).reason
    assert all(part in reason for part in ("542 roundings", "2048", "2^-8", "safety"))
    assert np.isfinite(derive_tolerance(2048, "bfloat16", 542).relative)
