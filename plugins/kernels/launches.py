"""Host-side arithmetic of the launches: how many splits, blocks, heads a chunk. No Triton here.

The C++ launcher computes the same numbers from the same formulas; every kernel module's docstring says where each is
used. All divisions are integer divisions; cdiv rounds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DECODE_PROGRAMS = 256  # about two programs for each SM of the largest chips
DECODE_MAX_SPLITS = 128
DECODE_MIN_TILES = 4  # a split shorter than this many tiles costs more to combine than it saves
PREFILL_WORKSPACE = 1 << 30  # bytes of expanded keys and values at a time
DISPATCH_CHUNK = 128  # slots one program of the counting sort ranks
LINEAR_PROGRAMS = 256  # of a narrow product: about two for each SM of the largest chips
LINEAR_MAX_SPLITS = 16
LINEAR_MIN_STEPS = 8  # a split of fewer steps costs more to sum than it saves


def cdiv(a: int, b: int) -> int:
    """The quotient a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def dot_size(n: int) -> int:
    """The padded size of a model dimension that enters tl.dot: a power of two, at least 16."""
    return max(16, next_power_of_2(n))


def decode_splits(batch: int, tiles: int, capacity: int, block_n: int) -> int:
    """Into how many pieces each sequence's cache (capacity = M * page tokens) is split at most, by its query tiles."""
    wanted = cdiv(DECODE_PROGRAMS, batch * tiles)
    useful = cdiv(capacity, DECODE_MIN_TILES * block_n)
    return max(1, min(wanted, useful, DECODE_MAX_SPLITS))


def prefill_chunk_heads(batch: int, capacity: int, heads: int, row_bytes: int) -> int:
    """Heads expanded at a time. row_bytes = (N + V) * sizeof(T): one head's keys and values of one token."""
    return max(1, min(heads, PREFILL_WORKSPACE // (batch * capacity * row_bytes)))


def linear_splits(blocks: int, columns: int, block_k: int) -> int:
    """Into how many pieces along K the sums of a narrow product of `blocks` programs are split."""
    useful = cdiv(columns, block_k) // LINEAR_MIN_STEPS
    return max(1, min(LINEAR_PROGRAMS // blocks, useful, LINEAR_MAX_SPLITS))


def dispatch_blocks(slots: int, experts: int, block: int) -> int:
    """Blocks of `block` rows that `slots` = T * K rows can fill at most when no block holds two experts."""
    return (slots + min(experts, slots) * (block - 1)) // block


@dataclass(frozen=True)
class HeadChunk:
    """Heads first..first+count-1."""

    first: int
    count: int


def head_chunks(heads: int, chunk: int) -> Iterator[HeadChunk]:
    """All heads, `chunk` at a time."""
    for first in range(0, heads, chunk):
        yield HeadChunk(first, min(chunk, heads - first))
