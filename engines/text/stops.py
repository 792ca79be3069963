"""StopText: finds stop strings in text that comes in pieces, and holds back what may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress


class StopText:
    """One answer's text as it may be shown: up to the stop string that is complete first, which is left out.

    Stop strings are looked for in the text with special tokens written out; what is shown leaves those out. Of several
    that are complete at the same character the longest counts, so pieces do not change what is found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = {stop: _borders(stop) for stop in stops}
        self._begun: list[_Match] = []  # stops that the end of _held begins
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
        before = len(self._held)
        self._held += piece
        self._shown += [not hidden] * len(piece)
        if not armed:
            return self.flush()
        for end, letter in enumerate(piece, before + 1):
            longest = self._read(letter)
            if longest:
                self.found = True
                text = self._take(end - longest)
                self._held, self._shown = "", []
                return text
        kept = max((match.length for match in self._begun), default=0)
        return self._take(len(self._held) - kept)

    def _read(self, letter: str) -> int:
        """Take one character; the length of the longest stop that is complete with it, or 0. It costs what stops have
        begun, however many and long they are.
        """
        again = {match.stop for match in self._begun}
        new = [_Match(stop, self._stops[stop]) for stop in self._stops if stop[0] == letter and stop not in again]
        self._begun = [match for match in (*self._begun, *new) if match.read(letter)]
        return max((match.length for match in self._begun if match.length == len(match.stop)), default=0)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        self._begun = []
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Let go of the first `count` characters, and give those of them that are shown."""
        text, shown = self._held[:count], self._shown[:count]
        self._held, self._shown = self._held[count:], self._shown[count:]
        return text if all(shown) else "".join(compress(text, shown))


@dataclass
class _Match:
    """How many of a stop's characters the text ends with (Knuth, Morris and Pratt)."""

    stop: str
    borders: list[int]
    length: int = 0

    def read(self, letter: str) -> bool:
        """Take one character; whether anything is left of the match."""
        while self.length and self.stop[self.length] != letter:
            self.length = self.borders[self.length - 1]
        self.length += self.stop[self.length] == letter
        return self.length > 0


def _borders(stop: str) -> list[int]:
    """Of each beginning of `stop`, how long the longest shorter beginning is that it ends with."""
    borders, length = [0], 0
    for letter in stop[1:]:
        while length and stop[length] != letter:
            length = borders[length - 1]
        length += stop[length] == letter
        borders.append(length)
    return borders
