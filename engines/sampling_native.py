"""The compiled sampler: a whole batch in one call, other threads running meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.sampling_row import SamplingRow
from deepseek_trt.engines.session import Floats, Int64s

# Log-probabilities of the picked tokens [B], ids and log-probabilities of the likeliest [B, most].
Picked = tuple[npt.NDArray[np.float64], npt.NDArray[np.int32], npt.NDArray[np.float64]]


class _Batch(ctypes.Structure):
    """SamplingBatch in engines/csrc/sampling.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("most", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
    )


class NativeSampler:
    """deepseek_trt_sample of one library, for one thread at a time; what it gives holds until the next call."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._sample, self._threads = library.deepseek_trt_sample, ctypes.c_int64(threads)
        self._made_for: tuple[Sequence[int], int, int] = ((), 0, 0)

    def pick(self, addresses: Sequence[int], logits: Floats, most: int) -> tuple[Int64s, Picked]:
        """Tokens [B] for logits [B, vocab] of the rows at `addresses`, which record them.

        Log-probabilities have room for `most` likeliest tokens a row; -1 where no row wants any.
        """
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        if self._made_for != (addresses, logits.shape[1], most):
            self._make(addresses, logits.shape[1], most)
        self._batch.logits = logits.ctypes.data
        self._sample(self._reference, self._threads)
        return self._tokens, self._picked

    def _make(self, addresses: Sequence[int], vocab: int, most: int) -> None:
        """What a call needs, to be used again as long as the same rows run."""
        count, room = len(addresses), max(most, 0)
        self._rows, self._tokens = np.array(addresses, dtype=np.uint64), np.empty(count, dtype=np.int64)
        self._picked = np.empty(count), np.empty((count, room), dtype=np.int32), np.empty((count, room))
        places = (array.ctypes.data for array in (self._tokens, *self._picked))
        self._batch = _Batch(self._rows.ctypes.data, 0, count, vocab, most, *places)
        self._reference = ctypes.byref(self._batch)
        self._made_for = (addresses, vocab, most)


def load_sampler(path: Path, threads: int = 1) -> NativeSampler | None:
    """The sampler of the compiled CPU operators at `path`; None where they have none, or another version's.

    `threads` are those of the operators, where they have as many: they are awake when a step has just ended.
    """
    library = ctypes.CDLL(str(path))
    try:
        size = library.deepseek_trt_sampling_row
    except AttributeError:
        return None
    size.restype = ctypes.c_int64
    return NativeSampler(library, threads) if size() == ctypes.sizeof(SamplingRow) else None
