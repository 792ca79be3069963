"""The numbers of a packed weight, some rows at a time: codes, zero points and scales, whatever their layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Array, Floats, numpy_dtype
from deepseek_trt.export.bundle.narrow import GROUP, SCALE_DTYPE
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.text.wording import some

Read = Callable[[StoredTensor, int, int], bytes]  # of a tensor, from an offset, so many bytes
_BLOCK = 2**24  # codes that are unpacked at once: an expert of V3
_KEPT = 2  # blocks in memory: rows that rotate together may lie in two
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight codes, the lowest first: which of eight numbers each is of
_INT8 = (-128, 127)
_MEND = "use the bfloat16 checkpoint that it was made from, and --quantize"


@dataclass(frozen=True)
class _Block:
    """Rows from `start` on: codes as bytes [rows, bytes of a row], of one code or of two, the low half first."""

    start: int
    codes: Array


class Unpacker:
    """Reads the small tensors of a packed weight when it is made, and of its codes a block of rows when it is asked.

    Raises CheckpointError naming the tensor whose numbers contradict config.json, or that no format here can hold.
    """

    def __init__(self, source: StoredTensor, read: Read) -> None:
        assert source.packed is not None
        self._packed, self._read, self._name = source.packed, read, source.name
        self._rows, self._columns = source.shape
        self._middle = 1 << (self._packed.bits - 1)
        self._blocks: list[_Block] = []
        self._check_shape()
        check_order(source, read)
        self._scales = self._by_row(self._numbers(self._packed.scales, numpy_dtype(self._packed.scales.dtype)))
        self._zeros = None if self._packed.zeros is None else self._read_zeros(self._packed.zeros)
        if self._packed.symmetric and self._zeros is not None:
            self._check_symmetric(self._packed.zeros)

    def numbers(self, first: int, count: int) -> Floats:
        """Rows of the weight in float32: (code - zero point) * scale, rounded once."""
        scales = self._scales[first : first + count].astype(np.float32)
        made: Floats = self._centred(first, count).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # export says what is not finite
            made *= self._spread(scales)
        return made

    def int4(self, first: int, count: int) -> Array:
        """Rows of codes as our int4 has them, two in a byte; of symmetric ones of 4 bits, whose bytes are the same."""
        return self._bytes(first, count)

    def int8(self, first: int, count: int) -> Array:
        """Rows of codes less their zero points, as int8. CheckpointError where that is too small."""
        made = self._centred(first, count)
        low, high = int(made.min()), int(made.max())
        if low < _INT8[0] or high > _INT8[1]:
            raise CheckpointError(
                f"tensor {some([self._name])}: codes less their zero points are from {low} to {high}, and int8 holds "
                f"{_INT8[0]} to {_INT8[1]}: {_MEND}"
            )
        return made.astype(np.int8)

    def scales(self, first: int, count: int) -> Array:
        """Of rows, in float16 for groups of 32: [count, columns / 32]."""
        each = np.repeat(self._scales[first : first + count], self._packed.group // GROUP, axis=1)
        return np.ascontiguousarray(each[:, : self._columns // GROUP].astype(SCALE_DTYPE))

    def check_scales(self) -> None:
        """CheckpointError where float16 cannot hold them all as they are; NaN and infinities it can."""
        with np.errstate(over="ignore"):
            wide = self._scales.astype(np.float32)
            held = self._scales.astype(SCALE_DTYPE).astype(np.float32)
        lost = (held != wide) & ~np.isnan(wide)
        if lost.any():
            example = float(wide[lost][0])
            raise CheckpointError(
                f"tensor {some([self._packed.scales.name])}: {int(lost.sum())} of its {lost.size} scales are no "
                f"numbers of float16, e.g. {example:.9g}, so that weights would be others: {_MEND}"
            )

    def _centred(self, first: int, count: int) -> Array:
        """Codes less their zero points, as int16."""
        codes = self._bytes(first, count)
        if codes.shape[1] != self._columns:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(count, self._columns)
        if self._zeros is None:
            return codes.astype(np.int16) - np.int16(self._middle)
        return codes.astype(np.int16) - self._spread(self._zeros[first : first + count])

    def _spread(self, of_groups: Array) -> Array:
        """What is of a group, for each number of a row; the last group may be cut."""
        return np.repeat(of_groups, self._packed.group, axis=1)[:, : self._columns]

    def _bytes(self, first: int, count: int) -> Array:
        """Rows of a block; of two where the rows are of both."""
        parts, end = [], first + count
        while first < end:
            block = self._block(first)
            at = first - block.start
            parts.append(block.codes[at : at + end - first])
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, row: int) -> _Block:
        """The one that holds the row."""
        found = next((b for b in self._blocks if b.start <= row < b.start + len(b.codes)), None)
        if found is None:
            each = max(_BLOCK // self._columns // 8 * 8, 8)  # a word of AWQ holds eight rows
            start = row // each * each
            found = _Block(start, self._unpack(start, min(start + each, self._rows)))
            self._blocks = [*self._blocks[1 - _KEPT :], found]
        return found

    def _unpack(self, start: int, stop: int) -> Array:
        codes, rows = self._packed.codes, stop - start
        if self._packed.layout == "rows":
            row = codes.nbytes // self._rows
            made = np.frombuffer(self._read(codes, start * row, rows * row), dtype=np.uint8).reshape(rows, row)
            return made ^ np.uint8(128) if codes.dtype == "I8" else made  # signed ones have their middle at 0
        if self._packed.layout == "columns":
            words = self._strip(codes, start, stop)  # [columns / codes of a word, rows]
            return np.ascontiguousarray(words.T).view(np.uint8)
        return _awq_codes(self._strip(codes, start // 8, -(-stop // 8)))[:, :rows].T.copy()

    def _strip(self, tensor: StoredTensor, start: int, stop: int) -> Array:
        """Columns of a matrix of words, read a row at a time where they are not all."""
        rows, columns = tensor.shape
        if stop - start == columns:
            return np.frombuffer(self._read(tensor, 0, tensor.nbytes), dtype="<u4").reshape(rows, columns)
        parts = [self._read(tensor, 4 * (row * columns + start), 4 * (stop - start)) for row in range(rows)]
        return np.frombuffer(b"".join(parts), dtype="<u4").reshape(rows, stop - start)

    def _numbers(self, tensor: StoredTensor, dtype: npt.DTypeLike) -> Array:
        made: Array = np.frombuffer(self._read(tensor, 0, tensor.nbytes), dtype=dtype).reshape(tensor.shape)
        return made

    def _by_row(self, of_groups: Array) -> Array:
        """[rows, groups], whichever way it is stored."""
        return of_groups if self._packed.layout == "rows" else np.ascontiguousarray(of_groups.T)

    def _read_zeros(self, tensor: StoredTensor) -> Array:
        """Zero points as int16 [rows, groups], on the scale of the codes."""
        if tensor.dtype == "I8":
            return self._numbers(tensor, np.int8).astype(np.int16) + np.int16(self._middle)
        words = self._numbers(tensor, "<u4")
        if self._packed.layout == "awq":
            return self._by_row(_awq_codes(words)[:, : self._rows]).astype(np.int16)
        along = words.T if self._packed.layout == "rows" else words  # [groups, words along the rows]
        bits = self._packed.bits
        each = [(along >> np.uint32(shift)) & np.uint32((1 << bits) - 1) for shift in range(0, 32, bits)]
        stored = np.stack(each, axis=-1).reshape(len(along), -1)[:, : self._rows].T.astype(np.int16)
        highest = (1 << bits) - 1
        if self._packed.less and (stored == highest).any():
            raise CheckpointError(
                f"tensor {some([tensor.name])}: {int((stored == highest).sum())} zero points are stored as {highest}, "
                f"which some programs read as {highest + 1} and some as 0: {_MEND}"
            )
        return np.ascontiguousarray(stored + np.int16(self._packed.less))

    def _check_symmetric(self, tensor: StoredTensor | None) -> None:
        assert tensor is not None
        assert self._zeros is not None
        others = self._zeros != self._middle
        if others.any():
            raise CheckpointError(
                f"tensor {some([tensor.name])}: {int(others.sum())} of its {others.size} zero points are not "
                f"{self._middle}, e.g. {int(self._zeros[others][0])}, and quantization_config says that codes are "
                "symmetric: download config.json again"
            )

    def _check_shape(self) -> None:
        tensor = self._packed.shape
        if tensor is None:
            return
        said = self._numbers(tensor, "<i8" if tensor.dtype == "I64" else "<i4")
        if tuple(said) != (self._rows, self._columns):
            raise CheckpointError(
                f"tensor {some([tensor.name])} says {said.tolist()}, its codes are of {[self._rows, self._columns]}: "
                "download the shard again"
            )


def check_order(source: StoredTensor, read: Read) -> None:
    """CheckpointError where the columns of a group do not lie side by side."""
    packed = source.packed
    if packed is None or packed.order is None:
        return
    order = np.frombuffer(read(packed.order, 0, packed.order.nbytes), dtype="<i4")
    if (order != np.arange(len(order)) // packed.group).any():
        raise CheckpointError(
            f"tensor {some([packed.order.name])}: the columns of a group do not lie side by side (activation order, "
            f"desc_act or actorder), and our groups are of {GROUP} neighbours: use a checkpoint without it, or {_MEND}"
        )


def _awq_codes(words: Array) -> Array:
    """[.., words] as [.., 8 * words], one code a byte."""
    made = np.empty((len(words), words.shape[1], 8), dtype=np.uint8)
    for place, number in enumerate(_AWQ):
        made[:, :, number] = (words >> np.uint32(4 * place)) & np.uint32(15)
    return made.reshape(len(words), -1)
