"""Chunks: which tokens of which prompts a step computes, so that no answer waits long for its next token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_trt.engines.generation.chunking.cost import PrefillCost
from deepseek_trt.engines.generation.request import Request, Work


@dataclass(frozen=True)
class Chunks:
    """The chunks of a step; `longest` is a chunk's most tokens, `budget` those of a step, padding and decode counted.

    While others decode a step's prefill costs at most `bound`. That leaves the chunk alone at the beginning of a
    prompt, and makes it shorter the more tokens are cached before it. The earliest prompt has one token at least.
    """

    cost: PrefillCost
    longest: int
    budget: int
    page_size: int

    @property
    def bound(self) -> int:
        """What as many tokens as the budget has cost in first chunks, in multiply-adds."""
        first = min(self.longest, self.budget)
        return self.budget * self.cost.of(first, 0) // first

    def of(self, running: Sequence[Request]) -> list[Work]:
        """Chunks of the prompts among `running`, in order of arrival; none of those that decode."""
        decoding = sum(request.decodes for request in running)
        room, step = self.budget - decoding, _Step(self.cost)
        for request in running:
            share = room // (len(step.work) + 1)
            if request.decodes or share < max(step.width, 1):
                continue
            count = min(request.left, self.longest, share)
            if decoding:
                count = self._within_bound(step, request, count)
            if count:
                step.add(request, count)
        return step.work

    def _within_bound(self, step: _Step, request: Request, most: int) -> int:
        """The most tokens of `most` by which the step stays within its bound; up to a page's end where those are fewer.

        0 where they were neither a page nor the prompt's rest: beside another chunk so few are not worth a row.
        """
        count = bisect_right(range(1, most + 1), self.bound, key=lambda tokens: step.cost_with(request, tokens))
        if count < most:
            whole = (request.cached + count) // self.page_size * self.page_size - request.cached
            count = max(whole, 0) or count
        if not step.work:
            return max(count, 1)
        return count if count >= min(self.page_size, request.left) else 0


class _Step:
    """What a step has so far."""

    def __init__(self, cost: PrefillCost) -> None:
        self.work: list[Work] = []
        self.width = 0  # of the longest chunk
        self._cost, self._attention = cost, 0

    def cost_with(self, request: Request, tokens: int) -> int:
        """The step's cost with such a chunk in it, too; what rows are padded with meets the weights as tokens do."""
        padded = (len(self.work) + 1) * max(self.width, tokens)
        return padded * self._cost.token + self._attention + self._cost.attention(tokens, request.cached)

    def add(self, request: Request, tokens: int) -> None:
        self.work.append(Work(request, tokens))
        self.width = max(self.width, tokens)
        self._attention += self._cost.attention(tokens, request.cached)
