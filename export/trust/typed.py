"""From JSON to dataclasses, by their annotations: a wrong type, an unknown key and an absurd number are named."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from deepseek_trt.export.trust.real_files import Errors

T = TypeVar("T")
_LEAST, _MOST = -1, 2**63 - 1  # -1 stands for a symbol, in dims
_HUGE = 1e300
_SHOWN = 60  # characters of a value in a message
_Read = Callable[[Any], Any]


class _WrongError(Exception):
    """What is wrong with the value, and the keys that lead to it, the innermost first."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.keys: list[str | int] = []


def typed(kind: type[T], raw: Any, file: object, error: Errors, mend: str) -> T:
    """The dataclass `kind` of what JSON holds; `error`, naming file, key and value, where it does not fit."""
    try:
        made: T = _reader(kind)(raw)  # type: ignore[arg-type]  # classes are hashable
    except _WrongError as wrong:
        place = "".join(f"[{k}]" if isinstance(k, int) else f".{_cut(k)}" for k in reversed(wrong.keys)).lstrip(".")
        raise error(f"{file}: {place or 'the whole'} {wrong}: {mend}") from None
    return made


@functools.cache
def _reader(hint: Any) -> _Read:
    """The function that makes a value of that annotation, or raises _WrongError."""
    origin, given = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _object_of(hint)
    if origin in (Union, types.UnionType):
        return _any_of(given)
    if origin is Literal:
        return _one_of(given)
    if origin is tuple:
        return _tuple_of(given)
    if origin in (dict, Mapping):
        return _mapping_of(given[1])
    if origin is Sequence:
        item = _reader(given[0])
        return lambda value: list(_items(value, item))
    return _PLAIN[hint]


def _object_of(cls: Any) -> _Read:
    hints = get_type_hints(cls)
    readers = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(cls)}

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _wrong(value, "an object")
        for name in value.keys() - readers.keys():
            raise _at(_WrongError("is a key that nothing here knows"), name)
        for name in readers.keys() - value.keys():  # what has a default, too: this package writes every field
            raise _at(_WrongError("is missing"), name)
        made = {}
        for name, inner in value.items():
            try:
                made[name] = readers[name](inner)
            except _WrongError as wrong:
                raise _at(wrong, name) from None
        return cls(**made)

    return read


def _any_of(hints: tuple[Any, ...]) -> _Read:
    readers = [_reader(hint) for hint in hints]

    def read(value: Any) -> Any:
        wrongs = []
        for reader in readers:
            try:
                return reader(value)
            except _WrongError as wrong:
                wrongs.append(wrong)
        raise max(wrongs, key=lambda wrong: len(wrong.keys))  # of the kind that came furthest

    return read


def _one_of(choices: tuple[Any, ...]) -> _Read:
    def read(value: Any) -> Any:
        if type(value) is not str or value not in choices:
            raise _wrong(value, f"one of {', '.join(map(str, choices))}")
        return value

    return read


def _tuple_of(hints: tuple[Any, ...]) -> _Read:
    if hints[1:] == (...,):
        item = _reader(hints[0])
        return lambda value: tuple(_items(value, item))
    readers = [_reader(hint) for hint in hints]

    def read(value: Any) -> Any:
        if type(value) is not list or len(value) != len(readers):
            raise _wrong(value, f"a list of {len(readers)}")
        return tuple(reader(inner) for reader, inner in zip(readers, value, strict=True))

    return read


def _items(value: Any, reader: _Read) -> list[Any]:
    if type(value) is not list:
        raise _wrong(value, "a list")
    made: list[Any] = []
    for index, inner in enumerate(value):
        try:
            made.append(reader(inner))
        except _WrongError as wrong:
            raise _at(wrong, index) from None
    return made


def _mapping_of(hint: Any) -> _Read:
    reader = _reader(hint)

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _wrong(value, "an object")
        made = {}
        for name, inner in value.items():
            try:
                made[name] = reader(inner)
            except _WrongError as wrong:
                raise _at(wrong, name) from None
        return made

    return read


def _integer(value: Any) -> int:
    if type(value) is not int or not _LEAST <= value <= _MOST:
        raise _wrong(value, "a whole number of sane size")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not -_HUGE < value < _HUGE:
        raise _wrong(value, "a number")
    return float(value)


def _plain(kind: type, name: str) -> _Read:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise _wrong(value, name)
        return value

    return read


_PLAIN: dict[Any, _Read] = {
    int: _integer,
    float: _number,
    str: _plain(str, "text"),
    bool: _plain(bool, "true or false"),
    type(None): _plain(type(None), "null"),
    Any: lambda value: value,
}


def _wrong(value: Any, wanted: str) -> _WrongError:
    return _WrongError(f"is {_cut(repr(value))}, where {wanted} is needed")


def _at(wrong: _WrongError, key: str | int) -> _WrongError:
    wrong.keys.append(key)
    return wrong


def _cut(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
