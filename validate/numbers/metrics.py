"""Numbers that say how alike two arrays, or two sets of next-token distributions, are. All in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Array

_SPACING_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}
_SMALLEST_EXPONENT = {"float32": -126, "float16": -14, "bfloat16": -126}


@dataclass(frozen=True)
class Closeness:
    """How near `value` lies to `reference`.

    Errors are infinite where either holds nan or inf, alike or not: nothing is right that is not a number. `relative`
    errors are relative to the largest finite |reference|; mean, median and ulps (units in the last place of the dtype
    at each reference element) are those of the finite elements. `worst` is the element with the largest error, or the
    first where the masks differ, or where a number is not finite.
    """

    max_absolute: float
    max_relative: float
    mean_relative: float
    median_relative: float
    median_ulps: float
    cosine: float
    worst: tuple[int, ...]
    worst_value: float
    worst_reference: float
    size: int
    nonfinite: int
    reference_nonfinite: int
    same_masks: bool


def closeness(value: Array, reference: Array, dtype: str) -> Closeness:
    """Compare two arrays of one shape; dtype is the one that ulps are counted in."""
    x, y = value.astype(np.float64), reference.astype(np.float64)
    strange = _kind(x) != _kind(y)
    finite = np.isfinite(x) & np.isfinite(y)
    lost = not bool(finite.all())
    error = np.abs(np.where(finite, x, 0.0) - np.where(finite, y, 0.0))
    order = np.where(strange, np.inf, np.where(finite, error, np.finfo(np.float64).max))
    worst = np.unravel_index(int(np.argmax(order)), x.shape)
    largest = float(np.abs(y[finite]).max(initial=0.0)) or 1.0
    ulps = error[finite] / _spacing(y[finite], dtype)
    top = float(np.inf if lost else error.max())
    return Closeness(
        max_absolute=top,
        max_relative=top / largest,
        mean_relative=float(error.mean() / largest),
        median_relative=float(np.median(error) / largest),
        median_ulps=float(np.median(ulps)) if ulps.size else 0.0,
        cosine=_cosine(x[finite], y[finite]),
        worst=tuple(int(i) for i in worst),
        worst_value=float(x[worst]),
        worst_reference=float(y[worst]),
        size=x.size,
        nonfinite=int((~np.isfinite(x)).sum()),
        reference_nonfinite=int((~np.isfinite(y)).sum()),
        same_masks=not bool(strange.any()),
    )


def log_softmax(logits: Array) -> Array:
    """NaN for rows that are not finite."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = x - x.max(-1, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kl_divergence(logits: Array, reference: Array) -> Array:
    """KL(reference || candidate) of each row's next-token distribution, in nats."""
    ours, theirs = log_softmax(logits), log_softmax(reference)
    result: Array = (np.exp(theirs) * (theirs - ours)).sum(-1)
    return result


def top_overlap(logits: Array, reference: Array, k: int) -> Array:
    """The fraction of each row's k best tokens that both name."""
    ours, theirs = (np.argsort(-x, axis=-1, kind="stable")[:, :k] for x in (logits, reference))
    return np.array([len(set(a) & set(b)) / k for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)])


def negative_log_likelihood(logits: Array, targets: Array) -> Array:
    """The loss of each row's target token, in nats."""
    result: Array = -np.take_along_axis(log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    return result


def _kind(x: Array) -> Array:
    """0 finite, 1 nan, 2 +inf, 3 -inf."""
    kind: Array = np.isnan(x) + 2 * np.isposinf(x) + 3 * np.isneginf(x)
    return kind


def _spacing(reference: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of `dtype` at each element."""
    exponent = np.frexp(np.abs(reference))[1] - 1
    spacing: Array = np.ldexp(1.0, np.maximum(exponent, _SMALLEST_EXPONENT[dtype]) - _SPACING_BITS[dtype])
    return spacing


def _cosine(x: Array, y: Array) -> float:
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float((x * y).sum()) / norms if norms else 1.0
