"""Next-token distributions of candidate and reference: how often they agree, and how far they lie apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Array
from deepseek_trt.validate.numbers.metrics import kl_divergence, top_overlap
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.steps import Step


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


def token_agreement(pair: Pair) -> TokenAgreement | None:
    """Compare the logits of every step; rows with nan or inf on either side disagree. None without predictions."""
    if not pair.predicts:
        return None
    steps = zip(pair.script.steps, pair.results, pair.reference, strict=True)
    pairs = [(step, ours["logits"], theirs["logits"]) for step, ours, theirs in steps]
    found = [_of_step(step, ours, theirs) for step, ours, theirs in pairs]
    total = sum(s.predictions for s in found)
    largest = max(float(np.abs(theirs).max(initial=0.0, where=np.isfinite(theirs))) for _, _, theirs in pairs)
    return TokenAgreement(
        predictions=total,
        top1=sum(s.top1 * s.predictions for s in found) / total,
        top5=sum(s.top5 * s.predictions for s in found) / total,
        kl_mean=sum(s.kl_mean * s.predictions for s in found) / total,
        kl_max=max(s.kl_max for s in found),
        kl_limit=(pair.policy("logits").relative * largest) ** 2 / 2,
        steps=tuple(found),
    )


def _of_step(step: Step, ours: Array, theirs: Array) -> StepAgreement:
    finite = np.isfinite(ours).all(-1) & np.isfinite(theirs).all(-1)
    kl = np.where(finite, kl_divergence(ours, theirs), np.inf)
    return StepAgreement(
        step.label,
        len(ours),
        float((finite * top_overlap(ours, theirs, 1)).mean()),
        float((finite * top_overlap(ours, theirs, min(5, ours.shape[1]))).mean()),
        float(kl.mean()),
        float(kl.max()),
    )
