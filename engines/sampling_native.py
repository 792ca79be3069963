"""The compiled sampler: a whole batch in one call, other threads running meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
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
    """deepseek_trt_sample of one library."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._sample, self._threads = library.deepseek_trt_sample, ctypes.c_int64(threads)

    def pick(self, addresses: Sequence[int], logits: Floats, most: int) -> tuple[Int64s, Picked]:
        """Tokens [B] for logits [B, vocab] of the rows at `addresses`, which record them.

        Log-probabilities have room for `most` likeliest tokens a row; -1 where no row wants any.
        """
        count, vocab = logits.shape
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        rows = np.array(addresses, dtype=np.uint64)
        tokens = np.empty(count, dtype=np.int64)
        own = np.empty(count)
        ids, values = np.empty((count, max(most, 0)), dtype=np.int32), np.empty((count, max(most, 0)))
        places = (array.ctypes.data for array in (tokens, own, ids, values))
        batch = _Batch(rows.ctypes.data, logits.ctypes.data, count, vocab, most, *places)
        self._sample(ctypes.byref(batch), self._threads)
        return tokens, (own, ids, values)


@cache
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
