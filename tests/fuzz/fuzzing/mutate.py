"""Seeded mutations of bytes and of JSON: what damage, careless tools and malice make of a good file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

# What stands in place of a number or of any other value, as JSON or nearly so.
BOUNDARIES = (
    *("0", "-1", "1", "2", "0.5", "-0.0", "1.0", "2147483647", "2147483648", "4294967296", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551616", "1e400", "-1e400", "1e308", "1e-320", "NaN", "Infinity"),
    *("-Infinity", "true", "false", "null", '""', '"0"', '"a"', '"\\u0000"', '"\\ud800"', '"\\u001b[31m"'),
    *('"\\n"', "[]", "{}", "[0]", "[null]", "[[]]", '{"a": 1}', '["a"]', "01", "+1", ".5", "0x10", "1_000"),
    "9" * 5000,
)
_KEYS = ("", "a", "__metadata__", "\u001b[2J", "\n", "model_type", "dtype", "x" * 300, "\ud800", "../x", "[/foo]")
_BYTES = (
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\n",
    b"\x1b",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
)
_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
DEEP = 100_000


class Raw(str):
    """Text that stands in the JSON as it is."""


class Pairs(list):  # type: ignore[type-arg]
    """An object as [key, value] lists: keys may stand twice."""


def parsed(data: bytes) -> Any:
    """The JSON with its objects as Pairs."""
    return json.loads(data, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def written(value: Any) -> str:
    """The JSON of what `parsed` gives, with Raw as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def mutated_json(rng: Random, data: bytes) -> bytes:
    """One to three changes of what the JSON says; now and then of its bytes, too."""
    value = parsed(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, value)
    text = written(value).encode("utf-8", "surrogatepass")
    return mutated_bytes(rng, text) if rng.random() < 0.05 else text


def mutated_bytes(rng: Random, data: bytes) -> bytes:
    """One to four changes of bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_BYTE_CHANGES)(rng, data)
    return data


def _changed(rng: Random, value: Any) -> Any:
    """A random place changed; of a list of many entries one is as likely as of a short one."""
    if not isinstance(value, list) or not value or rng.random() < 0.02:
        return _other(rng, value)
    at = rng.randrange(len(value))
    inside = value[at][1] if isinstance(value, Pairs) else value[at]
    if isinstance(inside, list) and inside and rng.random() < 0.75:
        inside = _changed(rng, inside)
    else:
        change = rng.choice(_LIST_CHANGES if not isinstance(value, Pairs) else _OBJECT_CHANGES)
        if change is not None:
            return change(rng, value, at)
        inside = _other(rng, inside)
    new = type(value)(value)
    new[at] = [value[at][0], inside] if isinstance(value, Pairs) else inside
    return new


def _other(rng: Random, value: Any) -> Any:
    """Another value in its place: a neighbour of it, or anything."""
    if rng.random() < 0.004:
        return Raw("[" * DEEP + "]" * DEEP)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, value * 2, -value, value + 0.5, float(value), str(value), [value]))
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice(
            (value[:-1], value + "x", value.upper(), value + "\n", value + "\u001b[1m", value * 50, [value])
        )
    return Raw(rng.choice(BOUNDARIES))


def _drop(rng: Random, value: list[Any], at: int) -> Any:
    return type(value)(value[:at] + value[at + 1 :])


def _double(rng: Random, value: list[Any], at: int) -> Any:
    one = [value[at][0], _other(rng, value[at][1])] if isinstance(value, Pairs) else value[at]
    where = rng.choice((at, at + 1, len(value)))
    return type(value)([*value[:where], one, *value[where:]])


def _rename(rng: Random, value: list[Any], at: int) -> Any:
    key = value[at][0]
    others = (key.upper(), key + " ", key[:-1], rng.choice(value)[0], rng.choice(_KEYS), key + "\u0000")
    return Pairs([*value[:at], [rng.choice(others), value[at][1]], *value[at + 1 :]])


def _swap(rng: Random, value: list[Any], at: int) -> Any:
    other, new = rng.randrange(len(value)), type(value)(value)
    if isinstance(value, Pairs):
        new[at], new[other] = [value[at][0], value[other][1]], [value[other][0], value[at][1]]
    else:
        new[at], new[other] = value[other], value[at]
    return new


def _add(rng: Random, value: list[Any], at: int) -> Any:
    one = Raw(rng.choice(BOUNDARIES))
    return type(value)([*value, [rng.choice(_KEYS), one] if isinstance(value, Pairs) else one])


_LIST_CHANGES = (_drop, _double, _swap, _add, None, None, None, None)
_OBJECT_CHANGES = (_drop, _double, _rename, _swap, _add, None, None, None, None, None)


def _flip(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) or 1)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _cut(rng: Random, data: bytes) -> bytes:
    start, end = _slice(rng, data)
    return rng.choice((data[:start], data[start:], data[:start] + data[end:]))


def _repeat(rng: Random, data: bytes) -> bytes:
    start, end = _slice(rng, data)
    return data[:end] + data[start:end] + data[end:]


def _insert(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((*_BYTES, rng.randbytes(rng.randrange(1, 9)))) + data[at:]


def _number(rng: Random, data: bytes) -> bytes:
    found = list(_NUMBER.finditer(data[:20_000]))
    if not found:
        return _flip(rng, data)
    one = rng.choice(found)
    return data[: one.start()] + rng.choice(BOUNDARIES).encode("utf-8", "surrogatepass") + data[one.end() :]


def _nest(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"[", b'{"a":')) * DEEP + data[at:] if rng.random() < 0.1 else _flip(rng, data)


def _slice(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 4096)))


_BYTE_CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (_flip, _flip, _cut, _repeat, _insert, _number, _nest)
