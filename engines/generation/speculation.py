"""Speculation: tokens that may come next are proposed, and one decode call computes the logits after each of them.

What is picked does not depend on it: every token is picked from the model's own logits in its place, by the same code
and with the same random number. A proposed token that is picked saves the call that would have computed its logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from deepseek_trt.export.bundle.graph import MOST_NEW_TOKENS
from deepseek_trt.export.errors import RequestError

MOST_DRAFTED = MOST_NEW_TOKENS - 1  # beside the token that decode is called for
OFF, LOOKUP, MTP, AUTO = SPECULATE = ("off", "lookup", "mtp", "auto")

_GRAMS = (3, 2)  # tokens that must be alike, the longer first
# Of AUTO: calls that are counted before it is judged, and how much each later one makes the earlier ones count less.
_TRIED, _KEPT = 8, 0.9
_SHORTEST_REST, _LONGEST_REST = 32, 1024  # calls without drafts where they did not pay
_PLAIN_AGAIN = 64  # calls with drafts between two without, whose time they are held against


def check_speculate(value: str) -> None:
    """RequestError for a way to speculate that there is not."""
    if value not in SPECULATE:
        raise RequestError(f"speculate {value!r}: must be one of {', '.join(SPECULATE)}")


class Lookup:
    """What followed the last tokens of a growing list where they stood before (prompt lookup)."""

    def __init__(self) -> None:
        self._places: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in _GRAMS)
        self._known = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens, or none. `tokens` are those of the last call, and more; the latest place counts."""
        for at in range(self._known, len(tokens)):  # what ends right before a token is followed by it
            for size, places in zip(_GRAMS, self._places, strict=True):
                if at >= size:
                    places[tuple(tokens[at - size : at])] = at
        self._known = len(tokens)
        for size, places in zip(_GRAMS, self._places, strict=True):
            start = places.get(tuple(tokens[-size:]))
            if start is not None:
                return _copied(tokens, start, most)
        return []


def _copied(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; after the last token comes what has been copied, so that a period goes on."""
    made: list[int] = []
    for at in range(start, start + count):
        made.append(tokens[at] if at < len(tokens) else made[at - len(tokens)])
    return made


class Payoff:
    """Whether calls with drafts have given more tokens a second than calls without, of late; any number of rows.

    A call of so many rows counts as its tokens a row, and costs its time over that of a call without drafts.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._plain: dict[int, float] = {}  # seconds of a call of so many rows without drafts
        self._tokens = self._cost = 0.0
        self._calls = self._resting = 0
        self._rest = _SHORTEST_REST

    def wants(self, rows: int) -> bool:
        """Whether the next call, of so many rows, should have drafts."""
        if self._resting:
            self._resting -= 1
            return False
        return rows in self._plain and self._calls % _PLAIN_AGAIN < _PLAIN_AGAIN - 1

    def plain(self, rows: int, seconds: float) -> None:
        """A call without drafts took so long."""
        before = self._plain.get(rows, seconds)
        self._plain[rows] = before + (seconds - before) / 4
        if self._calls % _PLAIN_AGAIN == _PLAIN_AGAIN - 1:
            self._calls += 1

    def drafted(self, rows: int, tokens: int, seconds: float) -> None:
        """A call with drafts gave so many tokens in all rows together."""
        if rows not in self._plain:
            return
        self._tokens = self._tokens * _KEPT + tokens / rows
        self._cost = self._cost * _KEPT + seconds / self._plain[rows]
        self._calls += 1
        if self._calls < _TRIED:
            return
        if self._tokens >= self._cost:
            self._rest = _SHORTEST_REST
            return
        self._resting, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)
        self._tokens = self._cost = 0.0
        self._calls = 0
