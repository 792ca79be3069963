"""How the cached tokens are cut into pieces: each once, none too long, and slots that no two pieces share."""

import pytest
import torch
import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.launches import DECODE_MIN_TILES, DECODE_ROWS, cdiv, decode_parts, decode_programs
from deepseek_trt.plugins.kernels.mla_schedule import pieces_before, row_of_piece, tiles_a_piece

TILE = 32  # tokens
CAPACITY = 1 << 17


@triton.jit
def write_pieces(
    past_lengths, sequence_lengths, found, batch, parts, capacity, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):  # fmt: skip
    """What mla_decode_split finds for its piece: [row, piece of it, the share, 0 where the combine agrees]."""
    piece = tl.program_id(0)
    share = tiles_a_piece(past_lengths, sequence_lengths, batch, 1, capacity, parts, BLOCK_B, BLOCK_N, MIN_TILES)
    row, before = row_of_piece(past_lengths, sequence_lengths, batch, 1, capacity, share, piece, BLOCK_B, BLOCK_N)
    again = pieces_before(past_lengths, sequence_lengths, row, 1, capacity, share, BLOCK_B, BLOCK_N)
    tl.store(found + piece * 4, row)
    tl.store(found + piece * 4 + 1, piece - before)
    tl.store(found + piece * 4 + 2, share)
    tl.store(found + piece * 4 + 3, before - again)


def pieces_of(lengths, parts, device, block=DECODE_ROWS):
    """(row, first tile, tiles) of each block that has any, for rows of `lengths` cached tokens and a new one."""
    past = torch.tensor(lengths, dtype=torch.int32, device=device)
    blocks = parts + len(lengths)
    found = torch.full((blocks, 4), -1, dtype=torch.int32, device=device)
    write_pieces[(blocks,)](
        past, torch.ones_like(past), found, len(lengths), parts, CAPACITY, BLOCK_B=block, BLOCK_N=TILE,
        MIN_TILES=DECODE_MIN_TILES,
    )  # fmt: skip
    assert not found[:, 3].any(), "the combine looks for the pieces elsewhere"
    pieces = []
    for row, number, share, _ in found.tolist():
        if row < len(lengths):
            tiles = cdiv(lengths[row] + 1, TILE)
            each = cdiv(tiles, cdiv(tiles, share))
            if number * each < tiles:
                pieces.append((row, number * each, min(each, tiles - number * each)))
    return pieces


RAGGED = (32768, *[1024] * 7)
CASES = [  # lengths, blocks at a time, tiles of queries, how much longer the longest piece may be than an even share
    (RAGGED, 264, 1, 1.3),  # 16 heads on an H100: two blocks on each of 132 multiprocessors
    (RAGGED, 132, 2, 1.3),  # 128 heads
    (RAGGED, 108, 4, 1.5),  # on an A100: with so few programs, eight sequences' rounding up is felt
    ((8191, 100, 0, 40000), 40, 1, 1.3),
]


@pytest.mark.parametrize(("lengths", "resident", "tiles", "most"), CASES)
def test_few_sequences_run_at_once_in_even_pieces(lengths, resident, tiles, most, device):
    programs = decode_programs(resident, tiles)
    pieces = pieces_of(lengths, decode_parts(programs, len(lengths)), device)
    assert len(pieces) <= programs, "the rest would wait until others are done"
    ideal = sum(cdiv(length + 1, TILE) for length in lengths) / programs
    assert max(count for *_, count in pieces) <= most * ideal


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ((0,), 1),
        ((5, 0, 127, 128, 129, 4000), 7),
        ((5, 0, 127, 128, 129, 4000), 1),
    ],
)
def test_every_tile_is_in_one_piece(lengths, parts, device):
    """With more rows than are loaded at a time, too."""
    pieces = pieces_of(lengths, parts, device)
    assert pieces_of(lengths, parts, device, block=4) == pieces
    covered = {}
    for row, first, count in pieces:
        assert count > 0
        covered.setdefault(row, []).extend(range(first, first + count))
    assert covered == {row: [*range(cdiv(length + 1, TILE))] for row, length in enumerate(lengths)}


def test_a_short_sequence_alone_is_whole(device):
    assert pieces_of((DECODE_MIN_TILES * TILE - 1,), 5, device) == [(0, 0, DECODE_MIN_TILES)]
