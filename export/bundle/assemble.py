"""Read graph tensors out of the checkpoint: runs of bytes in a new order, fp8 multiplied out, adapters added.

Packed weights give their numbers, or their codes and scales as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import E4M3, Array, numpy_dtype
from deepseek_trt.export.bundle.recipes import FP8, Piece, Recipe
from deepseek_trt.export.config.model_config import FP8_BLOCK
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.files import CHUNK
from deepseek_trt.export.packed.unpack import Unpacker
from deepseek_trt.export.reading.tensors import Factor, StoredTensor

_SCALE_DTYPES = {"F8_E8M0": ml_dtypes.float8_e8m0fnu}  # powers of two, beside those that weights may be


def chunks(recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> Iterator[Array]:
    """The recipe's numbers in order, as one-dimensional arrays of the sources' dtypes, or of float32 once computed."""
    with closing(_Reader()) as reader:
        for piece in recipe.pieces:
            source = _counted_by(piece, tensors[piece.source])
            scales = reader.scales(tensors[piece.scale]) if piece.scale else None
            added = Product(reader, source) if source.updates else None
            packed = Unpacker(source, reader.read) if source.packed else None
            for start, rows in piece.strips():
                if packed is not None:
                    yield from (packed.numbers(*strip).reshape(-1) for strip in _steps(source, start, rows))
                elif scales is None and added is None:
                    yield from reader.plain(source, start, rows)
                else:
                    yield from reader.computed(source, scales, added, start, rows)


def packed_chunks(recipe: Recipe, tensors: Mapping[str, StoredTensor], is_int4: bool) -> Iterator[tuple[Array, Array]]:
    """Codes and scales of a weight whose sources are packed, in order, some rows at a time.

    Raises CheckpointError naming a tensor whose numbers the format cannot hold as they are.
    """
    with closing(_Reader()) as reader:
        for piece in recipe.pieces:
            packed = Unpacker(tensors[piece.source], reader.read)
            packed.check_scales()
            for start, rows in piece.strips():
                for strip in _steps(tensors[piece.source], start, rows):
                    yield packed.int4(*strip) if is_int4 else packed.int8(*strip), packed.scales(*strip)


def kept_chunks(recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[Array, Array]]:
    """Codes [n, K] as bytes and scales [ceil(K / 128)] in float32 of a weight whose sources are fp8, in order: n rows
    that share their scales at a time.
    """
    with closing(_Reader()) as reader:
        for piece in recipe.pieces:
            assert piece.scale is not None
            source = tensors[piece.source]
            rows, columns = source.shape
            for block, scales in enumerate(reader.scales(tensors[piece.scale])):
                first = block * FP8_BLOCK
                count = min(FP8_BLOCK, rows - first)
                data = reader.read(source, first * columns, count * columns)
                yield np.frombuffer(data, dtype=np.uint8).reshape(count, columns), scales


def _steps(source: StoredTensor, start: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of parts of a strip that stay in the processor's cache."""
    step = max(CHUNK // (4 * source.shape[-1]), 1)
    for first in range(start, start + rows, step):
        yield first, min(step, start + rows - first)


def _counted_by(piece: Piece, source: StoredTensor) -> StoredTensor:
    """The tensor with the rows that the piece counts: where it orders a bias, each number is one."""
    as_column = piece.halves and len(source.shape) == 1
    return dataclasses.replace(source, shape=(*source.shape, 1)) if as_column else source


def one_run(recipe: Recipe, tensors: Mapping[str, StoredTensor], dtype: str) -> tuple[Path, int] | None:
    """The file and offset where the tensor's bytes lie in one run, as numbers of `dtype`; None where they do not."""
    first: tuple[Path, int] | None = None
    end = 0
    for piece in recipe.pieces:
        source = tensors[piece.source]
        if piece.scale or piece.halves or source.updates or source.packed or source.dtype != dtype:
            return None
        row = source.nbytes // math.prod(source.shape[:-1])
        for start, rows in piece.strips():
            at = source.offset + start * row
            first = first or (source.file, at)
            if (source.file, at) != (first[0], end or at):
                return None
            end = at + rows * row
    aligned = first is not None and first[1] % dtype_bytes(dtype) == 0
    return first if aligned else None


def assemble(
    recipe: Recipe, tensors: Mapping[str, StoredTensor], dtype: str, into: npt.NDArray[np.uint8] | None = None
) -> Array:
    """The tensor in memory, as `dtype` (bfloat16 is ml_dtypes'): in `into` [nbytes] where it is given."""
    result = np.empty(recipe.size, numpy_dtype(dtype)) if into is None else into.view(numpy_dtype(dtype))
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
        self._matrices: dict[StoredTensor, Array] = {}

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def plain(self, source: StoredTensor, start: int, rows: int) -> Iterator[Array]:
        """Rows of `source`, in chunks that need not end where a row does."""
        row = source.nbytes // math.prod(source.shape[:-1])
        at, end = start * row, (start + rows) * row
        while at < end:
            length = min(end - at, CHUNK)
            yield np.frombuffer(self.read(source, at, length), dtype=numpy_dtype(source.dtype))
            at += length

    def computed(
        self, source: StoredTensor, scales: Array | None, added: Product | None, start: int, rows: int
    ) -> Iterator[Array]:
        """Rows of `source` in float32, its fp8 blocks of 128 x 128 multiplied by their scales, then `added` to it."""
        columns = source.shape[-1]
        for first, count in _steps(source, start, rows):
            values = self._values(source, first * columns, count * columns).reshape(count, columns)
            with np.errstate(invalid="ignore", over="ignore"):  # export and validate say what is not finite
                if scales is not None:
                    blocks = scales[np.arange(first, first + count) // FP8_BLOCK]  # [count, ceil(columns / 128)]
                    values *= np.repeat(blocks, FP8_BLOCK, axis=1)[:, :columns]
                if added is not None:
                    values = (values + added.rows(first, count)).astype(np.float32)
            yield values.reshape(-1)

    def scales(self, source: StoredTensor) -> Array:
        """A whole tensor of block scales, [ceil(rows / 128), ceil(columns / 128)] in float32."""
        return self._values(source, 0, math.prod(source.shape)).reshape(source.shape)

    def factor(self, factor: Factor) -> Array:
        """In float64. A stored matrix that many factors are part of is read once for all that follow each other."""
        tensor = factor.tensor
        if tensor not in self._matrices:
            if len(self._matrices) == 2:
                del self._matrices[next(iter(self._matrices))]
            self._matrices[tensor] = self._values(tensor, 0, math.prod(tensor.shape)).reshape(tensor.shape)
        rows, columns = (
            slice(None) if part is None else slice(part.start, part.stop, part.step)
            for part in (factor.rows, factor.columns)
        )
        part = self._matrices[tensor][rows, columns].astype(np.float64)
        return part.T if factor.transposed else part

    def _values(self, source: StoredTensor, at: int, count: int) -> Array:
        """`count` numbers of a tensor in float32, in memory of their own."""
        if source.dtype == FP8:
            codes = np.frombuffer(self.read(source, at, count), dtype=np.uint8)
            return np.asarray(E4M3[codes])
        dtype = np.dtype(_SCALE_DTYPES.get(source.dtype) or numpy_dtype(source.dtype))
        data = self.read(source, at * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(data, dtype=dtype).astype(np.float32)

    def read(self, source: StoredTensor, at: int, length: int) -> bytes:
        """Bytes of a tensor, `at` counted from its start."""
        if source.file != self._file or self._stream is None:
            self.close()
            self._file, self._stream = source.file, source.file.open("rb")
        self._stream.seek(source.offset + at)
        data = self._stream.read(length)
        if len(data) != length:
            raise CheckpointError(f"{source.file} ends inside {source.name}; download it again")
        return data


class Product:
    """What a tensor's updates add to its rows, in float64: some rows at a time, one update in memory."""

    def __init__(self, reader: _Reader, source: StoredTensor) -> None:
        self._reader, self._updates = reader, source.updates
        self._each = math.prod(source.shape[:-1]) // len(source.updates)
        self._index, self._left, self._right = -1, np.empty(0), np.empty(0)

    def rows(self, first: int, count: int) -> Array:
        """[count, columns]."""
        parts, end = [], first + count
        while first < end:
            index, at = divmod(first, self._each)
            stop = min(at + end - first, self._each)
            self._load(index)
            parts.append(self._left[at:stop] @ self._right * self._updates[index].scale)
            first += stop - at
        return np.concatenate(parts)

    def _load(self, index: int) -> None:
        if index != self._index:
            update = self._updates[index]
            self._index, self._left = index, self._reader.factor(update.left)
            self._right = self._reader.factor(update.right)
