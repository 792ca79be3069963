"""Which block of MlaDecode takes which cached tokens: pieces of nearly the same length, whatever each sequence's is.

A sequence has cdiv(length, BLOCK_N) tiles, at least one, and is cut into cdiv(tiles, share) pieces, each of the same
number of tiles, of which the last may be cut short or left out; share = max(cdiv(tiles of all sequences, parts),
MIN_TILES). So there are at most parts + B pieces, and none is longer than the share. Piece i is block i's; a sequence's
pieces come one after the other, and i is the piece's slot in the workspace.

The lengths are on the device, so this is worked out there: by every block for itself, from the lengths of all
sequences, which is one load of B numbers and a few sums while they fit one block. So there is no table to make first,
none that the layers would have to share, and a CUDA graph captures no lengths. `parts` is the host's: launches.py.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import clamp_int


@triton.jit
def tokens_of(past_lengths, sequence_lengths, row, mask, steps, capacity):
    """The rows' tokens before the new ones, and in all: at least one, so that a row without any has a result."""
    past = clamp_int(tl.load(past_lengths + row, mask=mask, other=0), capacity)
    new = clamp_int(tl.load(sequence_lengths + row, mask=mask, other=0), tl.minimum(steps, capacity - past))
    return past, tl.maximum(past + new, 1)


@triton.jit
def tiles_of(past_lengths, sequence_lengths, row, mask, steps, capacity, BLOCK_N: tl.constexpr):
    """Tiles of each row; 0 where `mask` is false."""
    _, length = tokens_of(past_lengths, sequence_lengths, row, mask, steps, capacity)
    return tl.where(mask, tl.cdiv(length, BLOCK_N), 0)


@triton.jit
def tiles_a_piece(
    past_lengths,
    sequence_lengths,
    batch,
    steps,
    capacity,
    parts,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """The share: tiles that a piece has at most."""
    total = 0
    for first in range(0, batch, BLOCK_B):
        rows = first + tl.arange(0, BLOCK_B)
        tiles = tiles_of(past_lengths, sequence_lengths, rows, rows < batch, steps, capacity, BLOCK_N)
        total += tl.sum(tiles, 0)
    return tl.maximum(tl.cdiv(total, parts), MIN_TILES)


@triton.jit
def row_of_piece(
    past_lengths,
    sequence_lengths,
    batch,
    steps,
    capacity,
    share,
    piece,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The row that has `piece`, and the pieces of the rows before it; `batch` where there are fewer pieces."""
    row, before, seen = 0, 0, 0
    for first in range(0, batch, BLOCK_B):
        rows = first + tl.arange(0, BLOCK_B)
        tiles = tiles_of(past_lengths, sequence_lengths, rows, rows < batch, steps, capacity, BLOCK_N)
        pieces = tl.cdiv(tiles, share)
        passed = (rows < batch) & (seen + tl.cumsum(pieces, 0) <= piece)
        row += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, pieces, 0), 0)
        seen += tl.sum(pieces, 0)
    return row, before


@triton.jit
def pieces_before(
    past_lengths,
    sequence_lengths,
    row,
    steps,
    capacity,
    share,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pieces of all rows before `row`."""
    before = 0
    for first in range(0, row, BLOCK_B):
        rows = first + tl.arange(0, BLOCK_B)
        tiles = tiles_of(past_lengths, sequence_lengths, rows, rows < row, steps, capacity, BLOCK_N)
        before += tl.sum(tl.cdiv(tiles, share), 0)
    return before


@triton.jit
def piece_of_row(
    past_lengths,
    sequence_lengths,
    row,
    before,
    share,
    steps,
    capacity,
    BLOCK_N: tl.constexpr,
):
    """The row's tokens before the new ones and in all, and this block's piece of them: its first and its end.

    There is none where the first is not below the tokens in all: pieces before took all tiles.
    """
    past, length = tokens_of(past_lengths, sequence_lengths, row, True, steps, capacity)
    tiles = tl.cdiv(length, BLOCK_N)
    tokens = tl.cdiv(tiles, tl.cdiv(tiles, share)) * BLOCK_N  # of each of the row's pieces
    start = (tl.program_id(1) - before) * tokens
    return past, length, start, tl.minimum(start + tokens, length)
