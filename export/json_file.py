"""A JSON object in a file that a checkpoint or a user brings, or one sentence on why it is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from deepseek_trt.export.errors import ConfigError, DeepseekTrtError
from deepseek_trt.export.files import read_file

_MAX_BYTES = 16 * 2**20  # the published ones have thousands; an index of 150,000 tensors has 20 MB
_MAX_DEPTH = 64
_SHOWN = 60  # characters of a key in a message
Errors = type[DeepseekTrtError]


def read_object(path: Path, error: Errors = ConfigError, most: int = _MAX_BYTES, nan: bool = False) -> dict[str, Any]:
    """The object, read strictly: UTF-8, no NaN, no key twice, at most `most` bytes and of sane depth.

    `error` is what is raised. `nan` lets NaN and Infinity pass, to be named by their key. FileNotFoundError where there
    is no such file: what that means, callers know.
    """
    return object_of(_bytes(path, error, most), path, error, nan)


def object_of(data: bytes, path: Path, error: Errors = ConfigError, nan: bool = False) -> dict[str, Any]:
    """The object that the bytes of the file at `path` hold, read as strictly."""
    raw = value_of(data, path, error, nan)
    if not isinstance(raw, dict):
        raise error(f"{path} does not hold an object; download it again")
    return raw


def value_of(data: bytes, path: Path, error: Errors = ConfigError, nan: bool = False) -> Any:
    """Whatever the bytes hold, read as strictly."""

    def refuse(constant: str) -> NoReturn:
        raise error(f"{path} holds {constant}, which is no JSON: write a number or leave the key out")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return unique_object(pairs)
        except KeyError as twice:
            raise error(f"{path.name} has the key {twice.args[0]} twice in one object: remove one of them") from None

    def finite(digits: str) -> float:
        number = float(digits)  # 1e400 is infinite
        return number if nan or math.isfinite(number) else refuse(digits[:_SHOWN])

    text = _text(data, path, error)
    try:
        raw = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=None if nan else refuse)
    except ValueError as wrong:  # JSON, and whole numbers of more digits than Python reads
        raise error(f"{path} is not JSON ({wrong}); download it again") from None
    except RecursionError:
        raise error(f"{path} is nested too deeply; download it again") from None
    if _depth(raw) > _MAX_DEPTH:
        raise error(f"{path} is nested deeper than {_MAX_DEPTH} levels; download it again")
    return raw


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys, for json's object_pairs_hook; KeyError, which quotes the key, where one comes twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise KeyError(repr(key[:_SHOWN]))
            seen.add(key)
    return made


def _bytes(path: Path, error: Errors, most: int) -> bytes:
    try:
        return read_file(path, most)
    except FileNotFoundError:
        raise
    except OSError as wrong:
        raise error(f"{path} cannot be read: {wrong.strerror}") from None


def _text(data: bytes, path: Path, error: Errors) -> str:
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise error(f"{path} begins with a byte order mark: save it as UTF-8 without one")
    try:
        return data.decode()
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not JSON in UTF-8 ({wrong}); save it as UTF-8, or download it again") from None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items]
    return depth
