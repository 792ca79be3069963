"""Next-token distributions of candidate and reference: how often they agree, and how well each foretells the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from polygraphy.comparator import IterationResult

from deepseek_trt.validate.cases import NO_TARGET, Step
from deepseek_trt.validate.compare import tokens_of_output
from deepseek_trt.validate.metrics import Array, kl_divergence, negative_log_likelihood, top_overlap


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
    """Over all steps. Perplexities are over the case "text", None without one.

    `greedy_lengths` says for each sequence how many decode steps in a row, from the first, name the same next token,
    both being fed the script's tokens.
    """

    predictions: int
    top1: float
    top5: float
    kl_mean: float
    kl_max: float
    scored: int
    perplexity: float | None
    reference_perplexity: float | None
    greedy_lengths: tuple[int, ...]
    greedy_steps: int
    steps: tuple[StepAgreement, ...]


def token_agreement(
    steps: Sequence[Step], results: Sequence[IterationResult], reference: Sequence[IterationResult]
) -> TokenAgreement:
    """Compare the logits of every step; rows with nan or inf count as total disagreement."""
    pairs = [(step, _finite(a["logits"]), b["logits"]) for step, a, b in zip(steps, results, reference, strict=True)]
    found = [_of_step(step, ours, theirs) for step, ours, theirs in pairs]
    total = sum(s.predictions for s in found)
    ours_nll, theirs_nll = _scores(pairs)
    lengths = _greedy_lengths(pairs)
    return TokenAgreement(
        predictions=total,
        top1=sum(s.top1 * s.predictions for s in found) / total,
        top5=sum(s.top5 * s.predictions for s in found) / total,
        kl_mean=sum(s.kl_mean * s.predictions for s in found) / total,
        kl_max=max(s.kl_max for s in found),
        scored=len(ours_nll),
        perplexity=float(np.exp(np.mean(ours_nll))) if ours_nll else None,
        reference_perplexity=float(np.exp(np.mean(theirs_nll))) if theirs_nll else None,
        greedy_lengths=lengths,
        greedy_steps=max(sum(s.graph == "decode" and s.case == c for s in steps) for c in {s.case for s in steps}),
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


def _scores(pairs: Sequence[tuple[Step, Array, Array]]) -> tuple[list[float], list[float]]:
    """Negative log likelihoods of the text's tokens by both."""
    ours_nll: list[float] = []
    theirs_nll: list[float] = []
    for step, ours, theirs in pairs:
        if step.case != "text":
            continue
        places = tokens_of_output(step, "logits", len(ours))
        targets = np.array([step.targets[row, position - step.past_lengths[row]] for row, position in places])
        known = targets != NO_TARGET
        ours_nll += negative_log_likelihood(ours[known], targets[known]).tolist()
        theirs_nll += negative_log_likelihood(theirs[known], targets[known]).tolist()
    return ours_nll, theirs_nll


def _greedy_lengths(pairs: Sequence[tuple[Step, Array, Array]]) -> tuple[int, ...]:
    agree: dict[str, list[Array]] = {}
    for step, ours, theirs in pairs:
        if step.graph == "decode":
            agree.setdefault(step.case, []).append(ours.argmax(-1) == theirs.argmax(-1))
    return tuple(int(n) for rows in agree.values() for n in np.logical_and.accumulate(rows).sum(0))


def _finite(logits: Array) -> Array:
    """Rows that hold nan or inf become even distributions."""
    clean: Array = np.where(np.isfinite(logits).all(-1, keepdims=True), logits, 0.0)
    return clean
