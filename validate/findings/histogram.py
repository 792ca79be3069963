"""How the errors of all logits are spread, in half decades."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_trt.validate.pair import Pair

# Exponents of ten of the bin edges: relative errors below the first edge fall into the first bin.
EDGES = tuple(x / 2 for x in range(-20, 3))


@dataclass(frozen=True)
class ErrorHistogram:
    """counts[i] errors lie between 10^edges[i] and 10^edges[i+1], relative to the largest logit of their step."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    exact: int
    nonfinite: int


def error_histogram(pair: Pair) -> ErrorHistogram | None:
    """Count the errors of every logit of every step; None without predictions."""
    if not pair.predicts:
        return None
    errors = []
    for ours, theirs in zip(pair.results, pair.reference, strict=True):
        x, y = ours["logits"].astype(np.float64), theirs["logits"].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            errors.append((np.abs(x - y) / np.abs(y).max()).reshape(-1))
    every = np.concatenate(errors)
    finite = every[np.isfinite(every)]
    nonzero = np.clip(np.log10(finite[finite > 0]), EDGES[0], EDGES[-1])
    counts = np.histogram(nonzero, bins=np.array(EDGES))[0]
    return ErrorHistogram(EDGES, tuple(int(n) for n in counts), int((finite == 0).sum()), int(every.size - finite.size))
