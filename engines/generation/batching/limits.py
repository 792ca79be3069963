"""What a step of the scheduler may hold, and what its steps have done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from deepseek_trt.engines.generation.speculation import OFF, check_speculate
from deepseek_trt.engines.sessions.session import CHUNK
from deepseek_trt.export.errors import RequestError


class _Default(int):
    """A number that nobody gave: it is one of a CPU, and another device takes its own."""


@dataclass(frozen=True)
class SchedulerLimits:
    """What one step may hold.

    max_running: requests that own pages. token_budget: tokens computed in a step, one a decoding request and the rest
    for prefill, padding counted; beside decoding requests prefill also costs no more than so many tokens do at the
    beginning of prompts (chunking/cost.py). prefill_chunk: tokens of one prompt at once. Those two, where they are not
    given, grow with the session's own chunk (Session.chunk): engines take up to 4,096 tokens where a CPU takes 512.
    prefix_reuse: full pages with the same tokens before and in them are computed once and shared.
    speculate: "lookup" has every decode step without prefill compute what followed the last tokens where they stood
    before, too, within the budget; "mtp" what the layer of multi-token prediction drafts; "auto" the latter where the
    bundle has it, else the former, while that gives more tokens a second; "off". Answers stay the same.
    """

    max_running: int = 32
    token_budget: int = _Default(2 * CHUNK)
    prefill_chunk: int = _Default(CHUNK)
    prefix_reuse: bool = True
    speculate: str = OFF

    def __post_init__(self) -> None:
        check_speculate(self.speculate)
        if self.max_running < 1:
            raise RequestError(f"max_running {self.max_running}: must be at least 1")
        if self.prefill_chunk < 1:
            raise RequestError(f"prefill_chunk {self.prefill_chunk}: must be at least 1")
        if self.token_budget < self.max_running:
            raise RequestError(f"token_budget {self.token_budget}: must be at least max_running, {self.max_running}")

    @classmethod
    def for_batch(cls, rows: int, speculate: str = OFF) -> SchedulerLimits:
        """For `rows` requests that come together: a chunk of every prompt in one step, and nothing used again."""
        budget = _Default(max(rows, 1) * CHUNK)
        return cls(max(rows, 1), budget, prefix_reuse=False, speculate=speculate)

    def on(self, chunk: int) -> SchedulerLimits:
        """The limits where a step takes `chunk` tokens of a prompt best, as far as nobody gave others."""
        if not isinstance(self.prefill_chunk, _Default):
            return self
        budget = self.token_budget
        if isinstance(budget, _Default):
            budget = _Default(max(budget, budget * chunk // CHUNK))
        return dataclasses.replace(self, prefill_chunk=_Default(chunk), token_budget=budget)


@dataclass
class Counters:
    """What a scheduler has done so far, in tokens but for `preemptions`.

    decoded: tokens of answers that decode steps gave; accepted: those of them that were drafted, which took no step of
    their own. So a row got decoded / (decoded - accepted) tokens a step.
    """

    prefilled: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
    reused: int = 0
    preemptions: int = 0

    @property
    def tokens_a_step(self) -> float:
        """Of a row in a decode step."""
        return self.decoded / max(self.decoded - self.accepted, 1)

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were picked; 0 where none was drafted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def line(self) -> str:
        """What speculation gave."""
        share = f"{self.accepted} of {self.drafted} proposed tokens were picked ({100 * self.acceptance:.0f} %)"
        return f"speculation: {share}, {self.tokens_a_step:.2f} tokens a step"
