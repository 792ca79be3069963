"""The loss over a text, by candidate and reference, and how far the two may lie apart.

A token's loss is logsumexp(z) - z[t]. Where independent errors of standard deviation s move the logits z, it moves by
sum(p * e) - e[t], so by at most sqrt(2) * s, and to second order up by at most s^2 / 2 (half the errors' variance under
p). The mean of N tokens is off by sqrt(2 / N) * s of the first kind, and by all of the second. s follows from the
tolerance of the logits, which is relative: errors lie as far out, for their size, as the logits do.

In narrow dtypes the differences of torch's own run in that dtype are measured, token by token: their mean and its
standard error are the rounding floor of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Array
from deepseek_trt.validate.cases.long_cases import WINDOWS
from deepseek_trt.validate.numbers.loss import token_losses
from deepseek_trt.validate.numbers.tolerance import FLOOR_FACTOR, Tolerance
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.steps import Script


@dataclass(frozen=True)
class TextScore:
    """Mean losses in nats over the `scored` tokens of a text, and perplexities, which are exp(loss).

    `tolerance` bounds |loss - reference_loss|.
    """

    cases: str
    scored: int
    loss: float
    reference_loss: float
    perplexity: float
    reference_perplexity: float
    tolerance: float
    tolerance_reason: str

    @property
    def passed(self) -> bool:
        return abs(self.loss - self.reference_loss) <= self.tolerance


@dataclass(frozen=True)
class Losses:
    """The loss of each scored token, by candidate and reference; `rms` is that of the reference's logits."""

    cases: str
    ours: Array
    theirs: Array
    rms: float


def text_score(pair: Pair, floor: Pair | None) -> TextScore | None:
    """None without a text, and where layers are judged alone: the head then says nothing of the whole model's loss.

    `floor` is torch in the candidate's dtype, where that was run.
    """
    losses = losses_of(pair, pair.script) if pair.predicts and not pair.policy.is_local else None
    if losses is None:
        return None
    tolerance = _derived(losses, pair.policy("logits").relative)
    if floor is not None and pair.sees_routing:
        tolerance = _tightened(tolerance, losses_of(floor, pair.script))
    ours, theirs = float(losses.ours.mean()), float(losses.theirs.mean())
    return TextScore(
        cases=losses.cases,
        scored=len(losses.ours),
        loss=ours,
        reference_loss=theirs,
        perplexity=_exp(ours),
        reference_perplexity=_exp(theirs),
        tolerance=tolerance.relative,
        tolerance_reason=tolerance.reason,
    )


def losses_of(pair: Pair, script: Script) -> Losses | None:
    """Over the windows of the text, or where `script` has none, over the predictions of the case "text"."""
    scored = [i for i, step in enumerate(script.steps) if step.case.startswith(WINDOWS)]
    cases = WINDOWS if scored else "text"
    scored = scored or [i for i, step in enumerate(script.steps) if step.case == "text"]
    if not scored:
        return None
    logits = [pair.reference[i]["logits"] for i in scored]
    square = sum(float(np.square(x, dtype=np.float64).sum()) for x in logits) / sum(x.size for x in logits)
    # near ties that could not be followed are judged as equal: `judged`
    ours = _losses(pair, scored, [pair.judged[i]["logits"] for i in scored])
    return Losses(cases, ours, _losses(pair, scored, logits), math.sqrt(square))


def _losses(pair: Pair, indices: Sequence[int], logits: Sequence[Array]) -> Array:
    found = []
    for index, values in zip(indices, logits, strict=True):
        found.append(token_losses(values, pair.script.steps[index].targets_of(pair.lines[index]["logits"])))
    return np.concatenate(found)


def _derived(losses: Losses, relative: float) -> Tolerance:
    """From the logits' tolerance; twice, for chance."""
    s, count = relative * losses.rms, len(losses.ours)
    reason = (
        f"2 * sqrt(2 / {count} tokens) * s + s^2 / 2, s = {s:.2e} = the logits' tolerance {relative:.2e} "
        f"* their root mean square {losses.rms:.3g}"
    )
    return Tolerance(2 * math.sqrt(2 / count) * s + s**2 / 2, reason)


def _tightened(derived: Tolerance, floor: Losses | None) -> Tolerance:
    """The smaller of the derived tolerance and FLOOR_FACTOR times the measured floor of the mean."""
    if floor is None or len(floor.ours) < 2:
        return derived
    differences = floor.ours - floor.theirs
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))
    measured = FLOOR_FACTOR * (abs(mean) + error)
    if not 0 < measured < derived.relative:
        return derived
    reason = (
        f"{FLOOR_FACTOR:g} * (mean {abs(mean):.2e} + its standard error {error:.2e}) of torch's own differences "
        f"in this dtype over the same tokens; derived limit {derived.relative:.2e}"
    )
    return Tolerance(measured, reason)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
