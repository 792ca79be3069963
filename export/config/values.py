"""What a JSON value may be: the types and ranges that the tables of keys name, without any conversion.

As transformers' config classes: a number in quotes is no number, true is no 1, and 128.0 is no whole number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_trt.export.text.wording import shown

MAX_SIZE = 2**31 - 1  # TensorRT and the graphs' int32 inputs count in 31 bits
_HUGE = 1e30  # no setting is as large


class Kind(Protocol):
    """A type with its range."""

    @property
    def expected(self) -> str:
        """What is admitted, as a noun phrase."""

    def admits(self, value: Any) -> bool:
        """Whether a JSON value is of this kind; null never is."""


@dataclass(frozen=True)
class Integer:
    """A whole number; `floats` also admits 4096.0, for keys that transformers does not type."""

    low: int = 1
    high: int = MAX_SIZE
    floats: bool = False

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {'2^31 - 1' if self.high == MAX_SIZE else self.high}"

    def admits(self, value: Any) -> bool:
        whole = is_number(value) and (isinstance(value, int) or (self.floats and value.is_integer()))
        return whole and self.low <= value <= self.high


@dataclass(frozen=True)
class Number:
    """A finite number, whole or not, from `low` on; `above` leaves `low` itself out."""

    low: float
    above: bool = False
    high: float = _HUGE

    @property
    def expected(self) -> str:
        if self.above:
            return f"a number above {self.low:g}"
        return f"a number from {self.low:g} {f'to {self.high:g}' if self.high < _HUGE else 'on'}"

    def admits(self, value: Any) -> bool:
        return is_number(value) and self.low <= value <= self.high and not (self.above and value == self.low)


@dataclass(frozen=True)
class Flag:
    expected: str = "true or false"

    def admits(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Text:
    """A string that can be written as UTF-8, or one of `choices` where there are any."""

    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else "a string"

    def admits(self, value: Any) -> bool:
        return isinstance(value, str) and _is_unicode(value) and (not self.choices or value in self.choices)


@dataclass(frozen=True)
class ListOf:
    """A list of `item`s; `or_one` also admits one without its list."""

    item: Kind
    or_one: bool = False

    @property
    def expected(self) -> str:
        return f"{self.item.expected}, or a list of such" if self.or_one else f"a list, each of it {self.item.expected}"

    def admits(self, value: Any) -> bool:
        if isinstance(value, list):
            return all(self.item.admits(item) for item in value)
        return self.or_one and self.item.admits(value)


@dataclass(frozen=True)
class Object:
    """A JSON object, whose values are `item`s where that is given."""

    item: Kind | None = None

    @property
    def expected(self) -> str:
        return f"an object of values, each {self.item.expected}" if self.item else "an object"

    def admits(self, value: Any) -> bool:
        if not isinstance(value, dict) or not all(_is_unicode(key) for key in value):
            return False
        return self.item is None or all(self.item.admits(item) for item in value.values())


@dataclass(frozen=True)
class Anything:
    """For what nobody reads."""

    expected: str = "anything"

    def admits(self, value: Any) -> bool:
        return True


def is_number(value: Any) -> bool:
    """Whether it is a finite number and no boolean; numbers beyond 1e300 are as good as infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not (isinstance(value, float) and math.isnan(value)) and abs(value) <= 1e300


def nonfinite_in(name: str, value: Any) -> str | None:
    """E.g. "rope_scaling.factor is inf": where the JSON value of that name is NaN or an infinity, or holds one."""
    left = [(name, value)]
    while left:
        place, one = left.pop()
        if isinstance(one, float) and not math.isfinite(one):
            return f"{shown(place)[1:-1]} is {one}"
        if isinstance(one, (dict, list)):
            inner = one.items() if isinstance(one, dict) else enumerate(one)
            left += [(f"{place}.{key}", each) for key, each in inner]
    return None


def wrong_value(name: str, value: Any, kind: Kind) -> str:
    """The sentence about a value that `kind` does not admit."""
    quoted = isinstance(value, str) and isinstance(kind, (Integer, Number)) and value.strip()[:1].isdigit()
    mend = "write it without quotes" if quoted else "mend it in config.json"
    return f"{name} is {shown(value)}, where {kind.expected} is needed: {mend}"


def is_one_of(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether the value is among those of `neutral`, where true is no 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON's escapes can name half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
