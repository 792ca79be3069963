"""Scanner: text in pieces, taken up to marks that pieces may cut in two."""

from __future__ import annotations

from collections.abc import Sequence


class Scanner:
    """Holds the text that nobody has taken yet; once `ended`, a mark that is not whole is none."""

    def __init__(self) -> None:
        self._held = ""
        self.ended = False

    def feed(self, text: str) -> None:
        self._held += text

    @property
    def empty(self) -> bool:
        return not self._held

    def until(self, *marks: str) -> tuple[str, str | None]:
        """Text before the first of these marks, and the mark, both taken; without one, the text that cannot be part
        of one, and None. Of marks that begin at one place the first named counts.
        """
        found = [(at, order) for order, mark in enumerate(marks) if (at := self._held.find(mark)) >= 0]
        unsure = self._unsure(marks)
        if found and min(found)[0] <= unsure:
            at, order = min(found)
            text, self._held = self._held[:at], self._held[at + len(marks[order]) :]
            return text, marks[order]
        text, self._held = self._held[:unsure], self._held[unsure:]
        return text, None

    def before(self, *marks: str) -> tuple[str, str] | None:
        """Text before the first of these marks, and the mark, both taken; None, with nothing taken, without one."""
        found = [(at, order) for order, mark in enumerate(marks) if (at := self._held.find(mark)) >= 0]
        if not found:
            return None
        at, order = min(found)
        text, self._held = self._held[:at], self._held[at + len(marks[order]) :]
        return text, marks[order]

    def begins(self, mark: str) -> bool | None:
        """Whether the held text begins with the mark, which is then taken; None where that is not known yet."""
        if self._held.startswith(mark):
            self._held = self._held[len(mark) :]
            return True
        return None if not self.ended and mark.startswith(self._held) else False

    def skip_space(self) -> str:
        """Take white space off the front."""
        rest = self._held.lstrip()
        space, self._held = self._held[: len(self._held) - len(rest)], rest
        return space

    def rest(self) -> str:
        """All that is held, taken."""
        text, self._held = self._held, ""
        return text

    def _unsure(self, marks: Sequence[str]) -> int:
        """Where the longest end of the text starts that one of the marks begins with."""
        if self.ended:
            return len(self._held)
        longest = max(_overlap(self._held, mark) for mark in marks)
        return len(self._held) - longest


def _overlap(text: str, mark: str) -> int:
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
