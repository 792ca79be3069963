"""Write and assemble graph tensors: bytes of the checkpoint in a new order, converted where the dtype changes."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deepseek_trt.export.checkpoint import DTYPE_NAMES, StoredTensor
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.graph import dtype_bytes
from deepseek_trt.export.weights import Recipe, byte_ranges

WEIGHTS_FILE = "weights.safetensors"
_CHUNK = 16 * 2**20  # bytes read at once
_ALIGNMENT = 4096  # of the first tensor, so that the file can be mapped

NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
}
Progress = Callable[[int], None]  # called with the bytes done since the last call


@dataclass(frozen=True)
class WrittenTensor:
    """A graph tensor in the weights file. `overflows` counts values that float16 turned into infinity."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str
    overflows: int


def write_weights(
    recipes: tuple[Recipe, ...], tensors: dict[str, StoredTensor], dtype: str, path: Path, progress: Progress
) -> tuple[WrittenTensor, ...]:
    """Write all tensors as `dtype` into one safetensors file, holding one chunk in memory at a time."""
    header, data_start = _header(recipes, dtype)
    written = []
    with path.open("wb") as out:
        out.write(header)
        offset = data_start
        for recipe in recipes:
            digest, overflows, length = hashlib.sha256(), 0, 0
            for chunk in _chunks(recipe, tensors):
                data, lost = _convert(chunk, dtype)
                digest.update(data)
                out.write(data)
                overflows += lost
                length += len(data)
                progress(len(data))
            written.append(
                WrittenTensor(recipe.name, dtype, recipe.shape, offset, length, digest.hexdigest(), overflows)
            )
            offset += length
        out.flush()
        os.fsync(out.fileno())
    return tuple(written)


def assemble(recipe: Recipe, tensors: dict[str, StoredTensor], dtype: str) -> npt.NDArray[Any]:
    """The tensor in memory, as `dtype` (bfloat16 is ml_dtypes')."""
    result = np.empty(recipe.size, dtype=NUMPY_DTYPES[dtype])
    at = 0
    for chunk in _chunks(recipe, tensors):
        result[at : at + chunk.size] = chunk
        at += chunk.size
    return result.reshape(recipe.shape)


def weight_bytes(recipes: tuple[Recipe, ...], dtype: str) -> int:
    """Size of the weights file, but for its header."""
    return sum(recipe.size for recipe in recipes) * dtype_bytes(dtype)


def _header(recipes: tuple[Recipe, ...], dtype: str) -> tuple[bytes, int]:
    names = {ours: theirs for theirs, ours in DTYPE_NAMES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for recipe in recipes:
        end = offset + recipe.size * dtype_bytes(dtype)
        entries[recipe.name] = {"dtype": names[dtype], "shape": recipe.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)


def _chunks(recipe: Recipe, tensors: dict[str, StoredTensor]) -> Iterator[npt.NDArray[Any]]:
    """The recipe's numbers in order, as one-dimensional arrays of the sources' dtypes."""
    file, stream = None, None
    try:
        for source, offset, length in byte_ranges(recipe, tensors):
            if source.file != file or stream is None:
                if stream is not None:
                    stream.close()
                file, stream = source.file, source.file.open("rb", buffering=0)
            stream.seek(offset)
            while length:
                data = stream.read(min(length, _CHUNK))
                if not data:
                    raise CheckpointError(f"{source.file} ends inside {source.name}; download it again")
                length -= len(data)
                yield np.frombuffer(data, dtype=NUMPY_DTYPES[source.dtype])
    finally:
        if stream is not None:
            stream.close()


def _convert(chunk: npt.NDArray[Any], dtype: str) -> tuple[memoryview, int]:
    """The chunk's bytes as `dtype`, and how many finite numbers became infinite."""
    target = np.dtype(NUMPY_DTYPES[dtype])
    if chunk.dtype == target:
        return memoryview(chunk.view(np.uint8)), 0
    with np.errstate(over="ignore"):
        converted = chunk.astype(target)
    lost = int(np.isinf(converted).sum() - np.isinf(chunk).sum()) if dtype == "float16" else 0
    return memoryview(converted.view(np.uint8)), lost
