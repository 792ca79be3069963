"""Limits of one rendering: a checkpoint's template is foreign code, which may never end or fill the memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateRuntimeError

STEPS = 1_000_000  # rounds of loops and calls of macros
LONGEST = 2**23  # characters of one text; an item of a list counts as two
TOTAL = 2**27  # characters of all texts that are made on the way
ITEMS = 2_000_000  # that filters of lists look at, one after the other
LINE = 2**16  # characters for filters that search with patterns, which can take the square of that
SECONDS = 10.0
_DIGITS = 100  # after the point that a number is rounded to
_BITS = 10_000  # of a product or a power of numbers
# What makes a text longer by the numbers it is given, and by them times the text's length. "|x" is the filter x.
_PADDING = ("ljust", "rjust", "center", "zfill", "to_bytes", "|center", "|batch", "|slice")
_SPREADING = ("expandtabs", "|indent", "|tojson")
_FORMATTING = ("format", "format_map", "|format", "translate")
_SPLITTING = ("split", "rsplit", "splitlines", "partition", "rpartition", "|list")
_PART = 8  # characters that a part of a split text takes at least, as memory goes
_LOOKING = ("startswith", "endswith", "find", "rfind", "index", "rindex", "count")  # which make no text


class LimitError(TemplateRuntimeError):
    """A template wants more than it may have."""


class Budget:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self._steps = self._made = self._items = 0
        self._end = time.monotonic() + SECONDS

    def step(self, literal: int) -> None:
        """One more round of a loop, or call of a macro, whose body holds so many characters of its own."""
        self._steps += 1
        if self._steps > STEPS:
            raise LimitError(f"it takes more than {STEPS:,} rounds of loops and calls of macros")
        self.make(literal)

    def make(self, characters: int) -> None:
        """One more text; it is not there yet."""
        self.hold(characters)
        self._made += characters
        if self._made > TOTAL:
            raise LimitError(f"it makes texts of more than {TOTAL:,} characters together")
        if time.monotonic() > self._end:
            raise LimitError(f"it takes more than {SECONDS:g} seconds")

    def visit(self, items: int) -> None:
        """One more list whose items are looked at one after the other."""
        self._items += items
        if self._items > ITEMS:
            raise LimitError(f"its filters go through more than {ITEMS:,} items")
        self.make(0)

    def hold(self, characters: int) -> None:
        """One more value that holds others, none of them new."""
        if characters > LONGEST:
            raise LimitError(f"it makes a text of more than {LONGEST:,} characters, or a list that holds them")


_CURRENT: ContextVar[Budget] = ContextVar("budget")


def current() -> Budget:
    """The budget of the rendering that this thread is in."""
    return _CURRENT.get()


@contextmanager
def limited() -> Iterator[None]:
    """A new budget for what runs inside."""
    token = _CURRENT.set(Budget())
    try:
        yield
    finally:
        _CURRENT.reset(token)


def weight(value: Any) -> int:
    """Characters that `value` has as text, roughly; above LONGEST the count stops, as lists may hold one text often."""
    total, left = 0, [value]
    while left and total <= LONGEST:
        one = left.pop()
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, dict):
            total += 4 * len(one)
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)):
            total += 2 * len(one)
            left += one
        else:
            total += one.bit_length() // 3 + 1 if isinstance(one, int) else 8
    return total


def weight_of_operation(operator: str, left: Any, right: Any) -> int:
    """Characters of `left operator right`; LimitError for numbers that grow without end."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if operator in ("*", "**") and bits > _BITS:
            raise LimitError(f"it makes a number of more than {_BITS:,} bits")
        return 0
    if operator == "%":
        return _formatted(left, [right]) if isinstance(left, (str, bytes)) else 0
    size = sum(len(value) for value in (left, right) if _sized(value))
    times = [value for value in (left, right) if isinstance(value, int)] if operator == "*" else []
    return size * max((1, *times))


def weight_of_call(name: str, subject: Any, given: Sequence[Any]) -> int:
    """Characters of what the text's method `name`, or the filter "|name", makes of `subject`."""
    if name in _LOOKING or name.startswith("is"):
        return 0
    if name in ("replace", "|replace") and len(given) > 1:
        return weight(subject) + str(subject).count(str(given[0])) * weight(given[1])
    if name in ("join", "|join"):
        items, between = (given[0] if given else (), subject) if name == "join" else (subject, (*given, "")[0])
        return weight(items) + (len(items) if _sized(items) else 0) * weight(between)
    if name in _FORMATTING:
        return _formatted(subject, given)
    if name in _SPLITTING:
        return weight(subject) * (_PART if isinstance(subject, (str, bytes)) else 1)
    width = sum(max(value, 0) if isinstance(value, int) else weight(value) for value in given)
    if name in _PADDING:
        return weight(subject) + width
    return weight(subject) * (width + 1) if name in _SPREADING else weight(subject)


def check_line(name: str, subject: Any, given: Sequence[Any]) -> None:
    """LimitError for a text that is too long for the filter `name`."""
    if sum(map(weight, (subject, *given))) > LINE:
        raise LimitError(f"its filter {name} takes a text of more than {LINE:,} characters")


def check_digits(given: Sequence[Any]) -> None:
    """LimitError for a power of ten that would never be computed."""
    if any(isinstance(value, (int, float)) and abs(value) > _DIGITS for value in given):
        raise LimitError(f"it rounds to more than {_DIGITS} digits")


def _formatted(pattern: Any, values: Sequence[Any]) -> int:
    """A field is as wide as its value, or as a number in the pattern, or (* and {:{}}) as a number among the values."""
    text = str(pattern)
    widths = sum(int(digits[:10]) for digits in re.findall(r"\d+", text))
    if "*" in text or re.search(r"\{[^{}]*\{", text):
        widths += _largest_number(values)
    return len(text) + widths + len(text) * weight(values)


def _largest_number(values: Any) -> int:
    if isinstance(values, (list, tuple)):
        return max(map(_largest_number, values), default=0)
    return abs(values) if isinstance(values, int) else 0


def _sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple))
