"""How fast tokens came, for people."""

from __future__ import annotations

import time


class Speed:
    """A watch that starts when it is made, and is told of every token."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first: float | None = None
        self._last = self._begin
        self.tokens = 0

    def tick(self) -> None:
        """One more token."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens += 1

    @property
    def line(self) -> str:
        """E.g. "64 tokens, 35.1 tokens/s, first after 0.21 s"; the rate is that of the tokens after the first."""
        if self._first is None:
            return "0 tokens"
        after, seconds = self.tokens - 1, self._last - self._first
        rate = after / seconds if after and seconds else self.tokens / (self._last - self._begin)
        return f"{self.tokens} tokens, {rate:.1f} tokens/s, first after {self._first - self._begin:.2f} s"
