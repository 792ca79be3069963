"""Outputs that prove nothing are known, and those of a model are not among them."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.validate.numbers.empty import FLAT, ONE_NUMBER, REPEATED, why_empty

DRAWN = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
COLUMN, ROW = DRAWN[:, :1], DRAWN[:1]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([DRAWN, DRAWN[:2]], ""),
        ([np.zeros((3, 8))], ONE_NUMBER),
        ([np.full((3, 8), 0.25), np.full((1, 8), 0.25)], ONE_NUMBER),
        ([np.repeat(COLUMN, 8, axis=1)], FLAT),
        ([np.repeat(COLUMN, 8, axis=1) * (1 + 1e-7 * DRAWN)], FLAT),  # sums in another order
        ([np.repeat(COLUMN, 8, axis=1), DRAWN], ""),
        ([np.repeat(ROW, 3, axis=0), ROW], REPEATED),
        ([np.repeat(ROW, 3, axis=0), DRAWN], ""),
        ([ROW], ""),  # a single line
        ([COLUMN], ""),  # one label
        ([np.ones((3, 1)), np.ones((1, 1))], ONE_NUMBER),
        ([np.ones((1, 1))], ""),  # one label of one text
        ([np.full((3, 8), np.nan)], ""),  # counted elsewhere
        ([np.full((3, 8), np.inf)], ""),
        ([np.zeros((0, 8))], ""),
    ],
)
def test_why_empty(steps, reason):
    assert why_empty(steps) == reason
