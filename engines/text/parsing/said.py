"""Said: what a piece of an answer's text means; Parser: how it is found, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CallPart:
    """More of the call `index`: its name, which comes once, whole and first, or more text of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Said:
    """More of each: what is shown, what was thought before, and calls of tools."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def __add__(self, other: Said) -> Said:
        return Said(self.content + other.content, self.reasoning + other.reasoning, self.calls + other.calls)


class Parser(Protocol):
    """One answer's text in pieces, however it is cut: what is given for all pieces together is the same."""

    def push(self, text: str) -> Said:
        """What is known with this piece."""

    def flush(self) -> Said:
        """What was held back, when no more text comes."""


class Plain:
    """All is content."""

    def push(self, text: str) -> Said:
        return Said(text)

    def flush(self) -> Said:
        return Said()


@dataclass(frozen=True)
class WholeCall:
    """A call with all of its arguments' text."""

    name: str
    arguments: str


def whole_calls(parts: Iterable[CallPart]) -> list[WholeCall]:
    """The calls that parts make, in order."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for part in parts:
        names[part.index] = names.get(part.index, "") + (part.name or "")
        arguments[part.index] = arguments.get(part.index, "") + part.arguments
    return [WholeCall(names[index], arguments[index]) for index in sorted(names)]
