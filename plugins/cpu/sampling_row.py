"""What a sampler reads and gives for one row, laid out as in plugins/cpu/csrc/sampling/sampling.h."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PAIR = struct.Struct("=qd")  # SamplingTop: a token's id and its natural log-probability
NOT_FINITE = -1  # the token of a row whose logits are not finite
TopLogprobs = tuple[tuple[int, float], ...]  # (id, log-probability) of the likeliest tokens, best first

_MASK = 2**64 - 1
_LOG2E = 1.4426950408889634
_COLDEST = 1e-30  # lower temperatures are taken as this one, which float32 can divide by
_FLATTEST = 2e-38  # higher temperatures give this: float32's zero would be greedy


class SamplingRow(ctypes.Structure):
    """One request's parameters, randomness and history; the header says what each field means."""

    _fields_ = (
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("key", ctypes.c_uint64),
        ("draws", ctypes.c_uint64),
        ("seen", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("banned", ctypes.c_void_p),
        ("steepness", ctypes.c_float),
        ("repetition", ctypes.c_float),
        ("presence", ctypes.c_float),
        ("frequency", ctypes.c_float),
        ("seen_count", ctypes.c_int32),
        ("seen_room", ctypes.c_int32),
        ("banned_count", ctypes.c_int32),
        ("made", ctypes.c_int32),
        ("min_tokens", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("logprobs", ctypes.c_int32),
    )

    def history(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Tokens seen, each once, and how often each came up in the answer."""
        return _view(self.seen, self.seen_count, np.int32), _view(self.counts, self.seen_count, np.float32)

    def bans(self) -> npt.NDArray[np.int32]:
        """Tokens that may not come now."""
        return _view(self.banned, self.banned_count if self.made < self.min_tokens else 0, np.int32)

    def record(self, token: int) -> None:
        """Count the token as made and, where a history is kept, as seen."""
        self.made += 1
        if not self.seen:
            return
        (places,) = np.nonzero(self.history()[0] == token)
        place = int(places[0]) if len(places) else self.seen_count
        if place == self.seen_room:
            return  # the answer is longer than it was to be
        if place == self.seen_count:
            self.seen_count += 1
            self.history()[0][place] = token
        self.history()[1][place] += 1


class History:
    """Holds the memory of a row's history: tokens of the prompt, and room for those of the answer."""

    def __init__(self, row: SamplingRow, prompt: Sequence[int], answer: int) -> None:
        first = list(dict.fromkeys(prompt))
        self._tokens = np.zeros(len(first) + answer, dtype=np.int32)
        self._counts = np.zeros(len(first) + answer, dtype=np.float32)
        self._tokens[: len(first)] = first
        row.seen, row.counts = self._tokens.ctypes.data, self._counts.ctypes.data
        row.seen_count, row.seen_room = len(first), len(self._tokens)


def pack(ids: Iterable[int], logprobs: Iterable[float]) -> bytes:
    """Pack the likeliest tokens, best first: most are read when the answer is whole, and tuples cost time to make."""
    return b"".join(map(PAIR.pack, ids, logprobs))


def unpack(packed: bytes) -> TopLogprobs:
    """The tokens that `pack` packed."""
    return tuple(PAIR.iter_unpack(packed))


def steepness(temperature: float) -> float:
    """log2(e) / temperature, 0 for greedy."""
    return max(_LOG2E / max(temperature, _COLDEST), _FLATTEST) if temperature else 0.0


def key_of(seed: int) -> int:
    """A row's key, far apart for seeds that are close (splitmix64's finish)."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def _view(address: int | None, count: int, dtype: Any) -> npt.NDArray[Any]:
    if not address or not count:
        return np.empty(0, dtype=dtype)
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
