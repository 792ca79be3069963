"""StopText: finds stop strings in text that comes in pieces, and holds back what may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress


class StopText:
    """One answer's text as it may be shown: up to the stop string that is complete first, which is left out.

    Stop strings are looked for in the text with special tokens written out; what is shown leaves those out. Of several
    that are complete at the same character the longest counts, so pieces do not change what is found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[bool] = []  # of each character of _held
        self.found = False

    def push(self, piece: str, armed: bool = True, hidden: bool = False) -> str:
        """The text that can be shown now. While not `armed`, text passes unsearched; after `found`, nothing passes.

        `hidden` says that the piece is a special token's text.
        """
        if self.found:
            return ""
        if not self._stops:
            return "" if hidden else piece
        self._held += piece
        self._shown += [not hidden] * len(piece)
        if not armed:
            return self.flush()
        spans = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if spans:
            self.found = True
            text = self._take(min(spans)[1])
            self._held, self._shown = "", []
            return text
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - kept)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Let go of the first `count` characters, and give those of them that are shown."""
        text, shown = self._held[:count], self._shown[:count]
        self._held, self._shown = self._held[count:], self._shown[count:]
        return text if all(shown) else "".join(compress(text, shown))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
