"""JSON that this package wrote: read as strictly as a checkpoint's, then typed field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from deepseek_trt.export.json_file import object_of
from deepseek_trt.export.trust.real_files import Errors, open_real
from deepseek_trt.export.trust.typed import typed

_MAX_BYTES = 128 * 2**20  # V3's manifest has about 15 MB
_THEIR_MEND = "download it again"
T = TypeVar("T")


def read_own(folder: Path, name: str, error: Errors, mend: str) -> dict[str, Any]:
    """The object in a file of the folder; `error`, which ends with `mend`, where that is none or no real file."""
    with open_real(folder, name, error, mend) as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise error(f"{folder / name} is larger than {_MAX_BYTES} bytes: {mend}")
    return own_object(data, folder / name, error, mend)


def own_object(data: bytes, path: Path, error: Errors, mend: str) -> dict[str, Any]:
    """The object that the bytes of the file at `path` hold."""
    try:
        return object_of(data, path, error)
    except error as wrong:
        raise error(str(wrong).replace(_THEIR_MEND, mend)) from None


def own_record(kind: type[T], raw: dict[str, Any], version: tuple[str, int], path: Path, error: Errors, mend: str) -> T:
    """The object as a `kind`, whose field of that name holds that version."""
    key, wanted = version
    if type(raw.get(key)) is not int or raw[key] != wanted:
        raise error(f"{path}: {key} {raw.get(key)!r} is not {wanted}: {mend}")
    return typed(kind, raw, path, error, mend)
