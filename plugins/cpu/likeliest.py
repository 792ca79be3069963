"""The likeliest tokens, packed: they are made for every row at every step, and mostly read when the answer is whole."""

from __future__ import annotations

import struct
from collections.abc import Iterable

# A token's id and its natural log-probability: SamplingTop in plugins/cpu/csrc/sampling/sampling.h.
PAIR = struct.Struct("=qd")

TopLogprobs = tuple[tuple[int, float], ...]


def pack(ids: Iterable[int], logprobs: Iterable[float]) -> bytes:
    """Tokens and their log-probabilities, best first."""
    return b"".join(map(PAIR.pack, ids, logprobs))


def unpack(packed: bytes) -> TopLogprobs:
    """(id, logprob) of each token, best first."""
    return tuple(PAIR.iter_unpack(packed))
