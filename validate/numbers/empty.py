"""Outputs that prove nothing: a head of zeros, or one that never looks at the token, is agreed with by anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_trt.export.arrays import Array

# Sums of the same numbers in another order, in float32. Outputs that mean something differ by far more.
_SAME = 2.0**-20

ONE_NUMBER = "the reference is one number throughout"
FLAT = "the reference is one number in each line: it prefers nothing to anything"
REPEATED = "the reference is the same in every line of every step: it does not depend on the tokens"


def why_empty(steps: Sequence[Array]) -> str:
    """Why it proves nothing to agree with the lines [n, width] that each step gives; else nothing.

    What is not finite is left to those who count it.
    """
    steps = [step for step in steps if step.size]
    lines = sum(len(step) for step in steps)
    width = steps[0].shape[-1] if steps else 0
    is_flat = width > 1 and all(_is_flat(step) for step in steps)
    is_repeated = lines > 1 and all(_is_repeated(step, steps[0][:1]) for step in steps)
    if is_repeated and (is_flat or width == 1):
        return ONE_NUMBER
    if is_flat:
        return FLAT
    return REPEATED if is_repeated else ""


def _is_flat(lines: Array) -> bool:
    """Whether each line holds one number."""
    return _is_same(lines.max(-1), lines.min(-1))


def _is_repeated(lines: Array, first: Array) -> bool:
    return _is_same(lines, np.broadcast_to(first, lines.shape))


def _is_same(one: Array, other: Array) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        scale = max(float(np.abs(one).max()), float(np.abs(other).max()))
        return bool((np.abs(one - other) <= _SAME * scale).all())
