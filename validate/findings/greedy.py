"""Greedy agreement: how many tokens candidate and reference generate alike, each left alone with the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_trt.validate.cases.long_cases import GREEDY
from deepseek_trt.validate.pair import Pair


@dataclass(frozen=True)
class GreedyAgreement:
    """One prompt. `agreed` of `tokens` were generated alike before the first difference.

    There the reference puts its own token before the candidate's by `margin`, relative to its largest |logit|; rounding
    explains `allowed`, as both logits may move by their tolerance. Both are 0 where nothing differs; the margin is
    infinite where logits are not finite.
    """

    prompt: int
    prompt_tokens: int
    agreed: int
    tokens: int
    margin: float
    allowed: float

    @property
    def near_tie(self) -> bool:
        return self.margin <= self.allowed


def greedy_agreement(pair: Pair) -> tuple[GreedyAgreement, ...]:
    """Compare each prompt of the greedy case; empty where the script has none."""
    steps = [i for i, step in enumerate(pair.script.steps) if step.case == GREEDY]
    rows = len(pair.script.steps[steps[0]].input_ids) if steps else 0
    return tuple(_of_prompt(pair, steps, row) for row in range(rows))


def _of_prompt(pair: Pair, steps: list[int], row: int) -> GreedyAgreement:
    prompt = int(pair.script.steps[steps[0]].sequence_lengths[row])
    for agreed, index in enumerate(steps):
        owners = pair.lines[index]["logits"]
        last = max(line for line, (owner, _) in enumerate(owners) if owner == row)
        both = [side[index]["logits"][last].astype(np.float64) for side in (pair.results, pair.reference)]
        if not np.isfinite(both).all():
            return GreedyAgreement(row, prompt, agreed, len(steps), np.inf, 0.0)
        chosen = int(np.argmax(both[0]))
        expected = int(pair.script.steps[index].targets_of(owners[last : last + 1])[0])
        if chosen != expected:
            gap = max(float(both[1][expected] - both[1][chosen]), 0.0) / float(np.abs(both[1]).max())
            return GreedyAgreement(row, prompt, agreed, len(steps), gap, 2 * pair.policy("logits").relative)
    return GreedyAgreement(row, prompt, len(steps), len(steps), 0.0, 0.0)
