"""Next-token distributions of candidate and reference: how often they agree, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from polygraphy.comparator import IterationResult

from deepseek_trt.validate.cases.cases import Step
from deepseek_trt.validate.numbers.metrics import Array, kl_divergence, top_overlap


@dataclass(frozen=True)
class StepAgreement:
    """One step's predictions: means over its rows, and the largest KL divergence (nats)."""

    label: str
    predictions: int
    top1: float
    top5: float
    kl_mean: float
    kl_max: float


@dataclass(frozen=True)
class TokenAgreement:
    """Over all steps. `kl_limit` is the most that logits within their tolerance can give.

    Where no logit moves by more than d, KL is at most d^2 / 2 (Hoeffding's lemma over a range of 2 d).
    """

    predictions: int
    top1: float
    top5: float
    kl_mean: float
    kl_max: float
    kl_limit: float
    steps: tuple[StepAgreement, ...]


def token_agreement(
    steps: Sequence[Step],
    results: Sequence[IterationResult],
    reference: Sequence[IterationResult],
    tolerance: float,
) -> TokenAgreement:
    """Compare the logits of every step; rows with nan or inf count as total disagreement.

    `tolerance` is that of the logits, relative to the largest of a step.
    """
    pairs = [(step, _finite(a["logits"]), b["logits"]) for step, a, b in zip(steps, results, reference, strict=True)]
    found = [_of_step(step, ours, theirs) for step, ours, theirs in pairs]
    total = sum(s.predictions for s in found)
    largest = max(float(np.abs(theirs).max()) for _, _, theirs in pairs)
    return TokenAgreement(
        predictions=total,
        top1=sum(s.top1 * s.predictions for s in found) / total,
        top5=sum(s.top5 * s.predictions for s in found) / total,
        kl_mean=sum(s.kl_mean * s.predictions for s in found) / total,
        kl_max=max(s.kl_max for s in found),
        kl_limit=(tolerance * largest) ** 2 / 2,
        steps=tuple(found),
    )


def _of_step(step: Step, ours: Array, theirs: Array) -> StepAgreement:
    kl = kl_divergence(ours, theirs)
    return StepAgreement(
        step.label,
        len(ours),
        float(top_overlap(ours, theirs, 1).mean()),
        float(top_overlap(ours, theirs, min(5, ours.shape[1])).mean()),
        float(kl.mean()),
        float(kl.max()),
    )


def _finite(logits: Array) -> Array:
    """Rows that hold nan or inf become even distributions."""
    clean: Array = np.where(np.isfinite(logits).all(-1, keepdims=True), logits, 0.0)
    return clean
