"""The compiled sampler: a whole batch in one call, other threads running meanwhile."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deepseek_trt.export.arrays import Floats
from deepseek_trt.plugins.cpu.sampling_row import PAIR, SamplingRow


class Row(Protocol):
    """A row to sample: the address of its SamplingRow, and how many likeliest tokens it wants, -1 for none."""

    address: int
    logprobs: int


class _Batch(ctypes.Structure):
    """SamplingBatch in plugins/cpu/csrc/sampling/sampling.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("most", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("tops", ctypes.c_void_p),
    )


class NativeSampler:
    """Calls one library's deepseek_trt_sample, for one thread at a time."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._sample, self._threads = library.deepseek_trt_sample, ctypes.c_int64(threads)
        self._rows: list[Row] = []
        self._vocab = 0
        self.alike = True  # whether the rows of the last call want the same log-probabilities

    def pick(self, rows: Sequence[Row], logits: Floats) -> tuple[list[int], Sequence[float | None], Sequence[bytes]]:
        """Tokens of B rows for logits [B, vocab], their log-probabilities, and as many likeliest tokens as any wants.

        The rows record their tokens.
        """
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        if self._rows != rows or self._vocab != logits.shape[1]:
            self._prepare(list(rows), logits.shape[1])
        self._batch.logits = _address(logits)
        self._sample(self._reference, self._threads)
        tokens: list[int] = self._tokens.tolist()
        if self._most < 0:
            return tokens, self._none, self._no_tops
        logprobs: list[float] = self._logprobs.tolist()
        if self._most == 0:
            return tokens, logprobs, self._no_tops
        return tokens, logprobs, self._split.unpack(self._tops)

    def _prepare(self, rows: list[Row], vocab: int) -> None:
        """Lay out what a call needs; it is used again as long as the same rows run."""
        wanted, count = [row.logprobs for row in rows], len(rows)
        self._rows, self._vocab = rows, vocab
        self._most, self.alike = min(max(wanted), vocab), min(wanted) == max(wanted)
        self._addresses = np.array([row.address for row in rows], dtype=np.uint64)
        self._tokens, self._logprobs = np.empty(count, dtype=np.int64), np.empty(count)
        size = max(self._most, 0) * PAIR.size
        self._tops, self._split = (ctypes.c_char * (count * size))(), struct.Struct(f"{size}s" * count)
        self._none, self._no_tops = [None] * count, [b""] * count
        places = self._tokens.ctypes.data, self._logprobs.ctypes.data, ctypes.addressof(self._tops)
        self._batch = _Batch(self._addresses.ctypes.data, 0, count, vocab, self._most, *places)
        self._reference = ctypes.byref(self._batch)


def _address(array: Any) -> int:
    """The address of the first number, in half the time that array.ctypes takes when a step has gone by unused."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except TypeError:  # read-only
        return int(array.ctypes.data)


def load_sampler(path: Path, threads: int = 1) -> NativeSampler | None:
    """The sampler in the library at `path`; None where it has none, or another version's.

    `threads` are those of the operators, where they have as many: they are awake when a step has just ended.
    """
    library = ctypes.CDLL(str(path))
    try:
        size = library.deepseek_trt_sampling_size
    except AttributeError:
        return None
    size.restype = ctypes.c_int64
    return NativeSampler(library, threads) if size() == ctypes.sizeof(SamplingRow) + ctypes.sizeof(_Batch) else None
