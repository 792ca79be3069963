"""The header of a safetensors file, read strictly: what it says is true of the file, or it is refused."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from deepseek_trt.export.dtypes import WEIGHT_DTYPES
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.files import regular_file
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.text.valid import flaw_of
from deepseek_trt.export.text.wording import shown

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # maybe; JSON has two for a whole one
_ENTRY = {"dtype", "shape", "data_offsets"}
_LFS_POINTER = b"version https://git-lfs"
# Bits of one number, by the names of the safetensors format.
_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises CheckpointError, naming file and tensor, where the header is no such header, or where its tensors overlap,
    leave holes, or do not fill the file.
    """
    try:
        entries, start, size = _entries(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    places = sorted((_place(file, name, entry), name) for name, entry in entries.items())
    _check_places(file, places, size - start)
    for (begin, end), name in places:
        entry = entries[name]
        dtype = WEIGHT_DTYPES.get(entry["dtype"], entry["dtype"])
        yield StoredTensor(name, file, dtype, tuple(entry["shape"]), start + begin, end - begin)


def _entries(file: Path) -> tuple[dict[str, Any], int, int]:
    """What the header says by tensor, where the tensors' bytes start, and the file's size."""
    with regular_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        text = _header_text(file, stream, size)
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({_reason(error)}); download it again") from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError(f"{file} has a damaged header (not a JSON object); download it again")
    if _ESCAPED_HALF.search(text) and flaw_of(json.dumps(header, ensure_ascii=False)):
        raise CheckpointError(f"{file} has a damaged header (half a character in a name); download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file} has a damaged header (__metadata__ holds more than texts); download it again")
    return header, 8 + len(text), size


def _header_text(file: Path, stream: BinaryIO, size: int) -> bytes:
    head = stream.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
    if length > min(size - 8, _MAX_HEADER):
        if (head + stream.read(len(_LFS_POINTER) - 8)).startswith(_LFS_POINTER):
            raise CheckpointError(f"{file} is the pointer that Git LFS leaves for a file: run git lfs pull")
        raise CheckpointError(f"{file} is not a safetensors file, or is truncated; download it again")
    text = stream.read(length)
    if len(text) != length:
        raise CheckpointError(f"{file} is truncated; download it again")
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} stands in it twice")
    return found


def _whole(digits: str) -> int:
    if digits == "-0":  # which others read as a float
        raise ValueError("-0 is no whole number")
    return int(digits)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "not JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)


def _place(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, counted from the header's end, after checking what is said of it."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file} has a damaged header: tensor {shown(name)} {what}; download it again")

    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
        raise refuse("lacks dtype, shape or data_offsets")
    if entry.keys() != _ENTRY:
        raise refuse(
            f"has {shown(next(key for key in entry if key not in _ENTRY))} beside dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise refuse(f"is of the unknown dtype {shown(dtype)}")
    if not _counts(shape):
        raise refuse(f"has the shape {shown(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        raise refuse(f"has the data_offsets {shown(offsets)}")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise refuse(f"of shape {shown(shape)} in {dtype} does not fit its data_offsets {shown(offsets)}")
    return offsets[0], offsets[1]


def _counts(numbers: Any) -> bool:
    """Whether it is a list of whole numbers that are not negative."""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _check_places(file: Path, places: Sequence[tuple[tuple[int, int], str]], size: int) -> None:
    """Tensors lie one after the other, from the header's end to the file's."""
    at = 0
    for (begin, end), name in places:
        if begin != at:
            what = "overlaps another" if begin < at else "lies behind a hole"
            raise CheckpointError(f"{file} has a damaged header: tensor {shown(name)} {what}; download it again")
        at = end
    if at != size:
        raise CheckpointError(
            f"{file} is truncated or has grown: {size} bytes of tensors, its header says {at}; download it again"
        )
