"""Request: what a scheduler keeps of one prompt while it is answered, and the events that it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from deepseek_trt.engines.generation.drafting.states import States
from deepseek_trt.engines.generation.prefix import PrefixKeys
from deepseek_trt.engines.generation.sampling import Sampler
from deepseek_trt.engines.generation.speculation import Lookup

FinishReason = Literal["stop", "length"]


class Event(NamedTuple):  # made for every token: a frozen dataclass takes three times as long to make
    """One new token of a request; `finished` says why it is the last. Stop tokens are given too.

    logprob and the likeliest tokens, packed, are there where the request asked for them. With an `error` there is no
    token, and the request has ended.
    """

    request: int
    token: int
    finished: FinishReason | None
    logprob: float | None = None
    likeliest: bytes = b""
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """A prompt until its answer ends.

    tokens: prompt and answer; the first `cached` of them lie in `pages`. limit: tokens of the answer. id: the
    scheduler's, once it has queued the request.
    """

    tokens: list[int]
    sampler: Sampler
    limit: int
    most_pages: int
    stops: frozenset[int]
    keys: PrefixKeys
    id: int = -1
    lookup: Lookup = field(default_factory=Lookup)
    states: States = field(default_factory=States)
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    named: int = 0  # pages that the pool knows by key

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.cached

    @property
    def decodes(self) -> bool:
        return 0 < self.cached == len(self.tokens) - 1

    def finished_by(self, token: int) -> FinishReason | None:
        """Why the answer ends with `token`, which was sampled last. Before min_tokens no stop token can come."""
        if token in self.stops:
            return "stop"
        return "length" if self.sampler.made == self.limit else None


class Work(NamedTuple):
    """A row of a graph's batch: the request and how many of its tokens this step computes, those drafted last."""

    request: Request
    new: int
    draft: Sequence[int] = ()
