"""Read graph tensors out of the checkpoint: runs of bytes in a new order, fp8 blocks multiplied by their scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from deepseek_trt.export.arrays import Array, numpy_dtype
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.config.model_config import FP8_BLOCK
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.files import CHUNK
from deepseek_trt.export.reading.checkpoint import StoredTensor

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def chunks(recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> Iterator[Array]:
    """The recipe's numbers in order, as one-dimensional arrays of the sources' dtypes; float32 where they are fp8."""
    with closing(_Reader()) as reader:
        for piece in recipe.pieces:
            source = tensors[piece.source]
            scales = reader.scales(tensors[piece.scale]) if piece.scale else None
            for start, rows in piece.strips():
                if scales is None:
                    yield from reader.plain(source, start, rows)
                else:
                    yield from reader.scaled(source, scales, start, rows)


def assemble(recipe: Recipe, tensors: Mapping[str, StoredTensor], dtype: str) -> Array:
    """The tensor in memory, as `dtype` (bfloat16 is ml_dtypes')."""
    result = np.empty(recipe.size, dtype=numpy_dtype(dtype))
    at = 0
    for chunk in chunks(recipe, tensors):
        result[at : at + chunk.size] = chunk
        at += chunk.size
    return result.reshape(recipe.shape)


class _Reader:
    """Keeps the shard open that was read last: a recipe's pieces mostly lie in one."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._stream: BinaryIO | None = None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def plain(self, source: StoredTensor, start: int, rows: int) -> Iterator[Array]:
        """Rows of `source`, in chunks that need not end where a row does."""
        row = source.nbytes // math.prod(source.shape[:-1])
        at, end = start * row, (start + rows) * row
        while at < end:
            length = min(end - at, CHUNK)
            yield np.frombuffer(self._read(source, at, length), dtype=numpy_dtype(source.dtype))
            at += length

    def scaled(self, source: StoredTensor, scales: Array, start: int, rows: int) -> Iterator[Array]:
        """Rows of the fp8 tensor `source`, each block of 128 x 128 multiplied by its scale."""
        columns = source.shape[-1]
        step = max(CHUNK // (4 * columns), 1)
        for first in range(start, start + rows, step):
            count = min(step, start + rows - first)
            codes = np.frombuffer(self._read(source, first * columns, count * columns), dtype=np.uint8)
            values = _FP8_VALUES[codes].reshape(count, columns)
            blocks = scales[np.arange(first, first + count) // FP8_BLOCK]  # [count, ceil(columns / 128)]
            with np.errstate(invalid="ignore", over="ignore"):  # export and validate say what is not finite
                values *= np.repeat(blocks, FP8_BLOCK, axis=1)[:, :columns]
            yield values.reshape(-1)

    def scales(self, source: StoredTensor) -> Array:
        """A whole tensor of block scales, [ceil(rows / 128), ceil(columns / 128)] in float32."""
        data = np.frombuffer(self._read(source, 0, source.nbytes), dtype=numpy_dtype(source.dtype))
        return data.astype(np.float32).reshape(source.shape)

    def _read(self, source: StoredTensor, at: int, length: int) -> bytes:
        """Bytes of a tensor, `at` counted from its start."""
        if source.file != self._file or self._stream is None:
            self.close()
            self._file, self._stream = source.file, source.file.open("rb")
        self._stream.seek(source.offset + at)
        data = self._stream.read(length)
        if len(data) != length:
            raise CheckpointError(f"{source.file} ends inside {source.name}; download it again")
        return data
