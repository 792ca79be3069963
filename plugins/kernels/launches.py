"""Host-side arithmetic of the launches: how many splits, blocks, heads a chunk. No Triton here.

The C++ launcher computes the same numbers from the same formulas; every kernel module's docstring says where each is
used. All divisions are integer divisions; cdiv rounds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DECODE_MAX_PROGRAMS = 320  # two for each SM of the largest chips: bounds the workspace, as plans know no SM count
DECODE_MIN_TILES = 4  # a piece shorter than this many tiles costs more to combine than it saves
DECODE_NEW_TOKENS = 8  # new tokens of a sequence that a program of decode stores at a time: all that a graph takes
DECODE_ROWS = 128  # sequences whose lengths a program of decode loads at a time
PREFILL_WORKSPACE = 1 << 30  # bytes of expanded keys and values at a time
SAMPLING_TOPS = 32  # likeliest tokens a row may ask for: each is a pass over its logits
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


def decode_programs(resident: int, tiles: int) -> int:
    """How many programs share the cached tokens, for each of `tiles` tiles of queries: as many as run at a time."""
    return max(1, min(resident, DECODE_MAX_PROGRAMS) // tiles)


def decode_parts(programs: int, batch: int) -> int:
    """Of how many the tokens of all sequences are cut for: at most `programs`; parts + batch pieces come of it at most.

    Few sequences leave room for the piece that each may have more. As many as fit once or several times are cut alike,
    so that sequences of one length fill the chip; more than fit are cut where one is longer than a program's share.
    """
    if 4 * batch <= programs:
        return programs - batch
    return batch * (programs // batch) if batch <= programs else programs


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
