"""DecodeRows: requests that decode one token each, step after step, as the arrays that a session takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from deepseek_trt.engines.generation.pages import PagePool, page_table
from deepseek_trt.engines.generation.request import Event, Request
from deepseek_trt.engines.generation.sampling import Choice
from deepseek_trt.export.arrays import Int32s, Int64s

_event = partial(tuple.__new__, Event)  # from all its fields, without a Python call each


class DecodeRows:
    """Rows that go on together. Work a row in Python is what a step costs beside its session, so there is little.

    Arrays are made anew where they change: a session may still hold those of the step before.
    """

    def __init__(self, requests: Sequence[Request], page_size: int) -> None:
        """All `requests` decode, and have a page for their next token."""
        self.requests = list(requests)
        self._page = page_size
        self.ids: Int64s = np.array([[request.tokens[-1]] for request in requests], dtype=np.int64)
        self.past: Int32s = np.array([request.cached for request in requests], dtype=np.int32)
        self.new: Int32s = np.ones_like(self.past)
        self.table: Int32s = page_table([request.pages for request in requests])
        self._names = [request.id for request in requests]
        self._room = page_size * np.array([len(request.pages) for request in requests], dtype=np.int32)
        self._stops = frozenset[int]().union(*(request.stops for request in requests))
        self._left = min(request.limit - request.sampler.made for request in requests)
        self._guided = any(request.sampler.guide for request in requests)

    def grow(self, pool: PagePool) -> bool:
        """A page for every row that has none for its next token; False, and nothing done, where too few are free."""
        full = np.flatnonzero(self.past == self._room)
        if len(full) > pool.free:
            return False
        for row in full.tolist():
            self.requests[row].pages += pool.take(1)
        if len(full):
            self._room[full] += self._page
            self.table = page_table([request.pages for request in self.requests])
        return True

    def advance(self) -> list[Request]:
        """One more token of every row is cached; returns the requests one of whose pages is full now."""
        self.past = self.past + 1
        for request in self.requests:
            request.cached += 1
        return [self.requests[row] for row in np.flatnonzero(self.past % self._page == 0).tolist()]

    def go_on(self, choices: Sequence[Choice | Exception]) -> list[Event] | None:
        """Remember the rows' tokens, and their events; None, and nothing done, where an answer ends or is guided."""
        self._left -= 1
        if self._guided or not self._left or not all(type(choice) is tuple for choice in choices):
            return None
        tokens, logprobs, tops = zip(*choices, strict=True)
        if min(tokens) < 0 or not self._stops.isdisjoint(tokens):
            return None
        for request, token in zip(self.requests, tokens, strict=True):
            request.tokens.append(token)
        self.ids = np.array(tokens, dtype=np.int64)[:, None]
        none = [None] * len(tokens)
        return list(map(_event, zip(self._names, tokens, none, logprobs, tops, none, strict=True)))
