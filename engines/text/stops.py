"""StopText: finds stop strings in text that comes in pieces, and holds back what may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """One answer's text as it may be shown: up to the stop string that is complete first, which is left out.

    Of several that are complete at the same character the longest counts, so pieces do not change what is found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str, armed: bool = True) -> str:
        """The text that can be shown now. While not `armed`, text passes unsearched; after `found`, nothing passes."""
        if self.found:
            return ""
        text, self._held = self._held + piece, ""
        if not armed:
            return text
        spans = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if spans:
            self.found = True
            return text[: min(spans)[1]]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
