"""What quantization_config says of packed weights, in one spelling for all methods, and the keys that say it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_trt.export.config.values import Anything, Kind, is_one_of, wrong_value
from deepseek_trt.export.packed.patterns import Pattern
from deepseek_trt.export.reading.tensors import Layout
from deepseek_trt.export.text.wording import shown, some

GROUP = 32  # of our formats: published groups are multiples of it
ADVICE = "use the bfloat16 checkpoint that it was made from, and --quantize"
ABSENT: tuple[Any, ...] = (None, False, 0, "", [], {})  # values that say that a feature is not used
_ROW = (-1, None)  # group sizes that mean a whole row


@dataclass(frozen=True)
class Setting:
    """A key of quantization_config. Of a used key `kind` is that of its values, and `only` those that are supported.

    Keys that are neither used nor harmless are refused, but for these. Null is as good as absent.
    """

    name: str
    why: str
    kind: Kind = Anything()  # noqa: RUF009 - frozen
    only: tuple[Any, ...] | None = None


def harmless(why: str, *names: str) -> tuple[Setting, ...]:
    return tuple(Setting(name, f"harmless: {why}") for name in names)


@dataclass(frozen=True)
class Scheme:
    """How modules are packed that one of `targets` matches. `group` is None where it is a row.

    `stored` is the ending of the tensor of codes. `ordered`: columns may be of groups in any order.
    """

    layout: Layout
    stored: str
    bits: int
    group: int | None
    symmetric: bool
    targets: tuple[Pattern, ...]
    less: int = 0
    ordered: bool = False

    @property
    def words(self) -> str:
        group = "a scale a row" if self.group is None else f"groups of {self.group}"
        return f"{self.bits} bits, {group}, {'symmetric' if self.symmetric else 'with zero points'}"


@dataclass(frozen=True)
class PackedSettings:
    """`label` is what people call the method, `whole` matches modules that are not packed; `key` says so."""

    label: str
    schemes: tuple[Scheme, ...]
    whole: tuple[Pattern, ...]
    key: str


def faults(at: str, settings: Mapping[str, Any], table: Iterable[Setting], label: str) -> Iterator[str]:
    """A sentence for each value of another type, out of range or not supported; keys are named behind `at`."""
    for key in table:
        value = settings.get(key.name)
        if value is None:
            continue
        name = f"{at}.{key.name}"
        if not key.kind.admits(value):
            yield wrong_value(name, value, key.kind)
        elif key.only is not None and not is_one_of(value, key.only):
            wanted = "" if key.only == ABSENT else f" ({label} is read with {_choices(key.only)})"
            why = "" if key.why.startswith("used") else f": {key.why}"
            yield f"{name} {shown(value)} is not supported{wanted}{why}; {ADVICE}"


def faults_of_group(at: str, size: Any, label: str) -> Iterator[str]:
    """Of a group size that is a whole number, or null."""
    if size not in _ROW and (size < 1 or size % GROUP):
        yield (
            f"{at} {shown(size)} is not supported: {label} is read with groups of a multiple of {GROUP} numbers, "
            f"or of a row (-1); {ADVICE}"
        )


def faults_of_pattern(at: str, pattern: str) -> Iterator[str]:
    """Of a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield f"{at} {shown(pattern)} is no pattern ({error}); download config.json again"


def group_of(size: int | None) -> int | None:
    return None if size in _ROW else size


def unknown(at: str, settings: Mapping[str, Any], table: Iterable[Setting]) -> Iterator[str]:
    """A sentence for each key that is not in the table."""
    known = {key.name for key in table}
    for key, value in settings.items():
        if key not in known and not is_one_of(value, (None, False)):
            yield f"config.json's key {at}.{shown(key)} is not known here: its value {shown(value)} is not read"


def _choices(values: tuple[Any, ...]) -> str:
    return some([str(value) for value in values], len(values))
