"""MlaDecode: split-KV attention of few new tokens a sequence over the paged latents, absorbed, then a combine.

All heads share one key row (kv_lora_rank latents and the rotated rope part), whose latent part is the value too: a tile
of queries, one a new token and head, reads each cached row once (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

New tokens' keys are read from `latent`, and only those before them from the pages: so no block waits for another's
stores. The block of a sequence's last piece and first queries puts its new tokens into their pages, padding apart.

Each block takes one piece of one sequence, all of nearly the same length: plugins/kernels/mla_schedule.py says which. A
piece that is a whole sequence is written to the output directly; of the others each result is normalised by its own sum
and carries that sum's logarithm, and a second kernel weighs them. Where a new token sees nothing of a piece, that is
minus infinity.

Launches, on memory that already holds past_latent (where the output is not past_latent's own memory, copy it first).
BLOCK_H, BLOCK_N, BLOCK_D from the variants; Q = S * H; tiles = cdiv(Q, BLOCK_H); resident: blocks of mla_decode_split
that the GPU runs at a time;
programs = max(1, min(resident, 320) / tiles); parts = launches.decode_parts(programs, B)
    = programs - B where 4 * B <= programs, else B * (programs / B) where B <= programs, else programs:

    mla_decode_split    grid (tiles, parts + B, 1)
        query *T [B, S, H, D], latent *T [B, S, D], pool *T [P, page, D] (present), page_table *i32,
        past_lengths *i32, sequence_lengths *i32, partial *fp32 (workspace 1), partial_lse *fp32 (workspace 2),
        attended *T [B, S, H, L], scale_log2 fp32 = scale * log2(e) (product in double, then rounded), batch i32 = B,
        steps i32 = S, parts i32 = parts, table_width i32 = M, pages i32 = P
    mla_decode_combine  grid (B * Q, cdiv(L, BLOCK_D), 1)
        partial *fp32, partial_lse *fp32, past_lengths *i32, sequence_lengths *i32, attended *T, batch i32 = B,
        steps i32 = S, parts i32 = parts, capacity i32 = M * page

    workspace 1: (parts + B) * Q * L * 4 bytes; workspace 2: (parts + B) * Q * 4 bytes; each rounded up to 256. At build
    time, parts is at most max(1, 320 / tiles) for each S.
Slots of the workspace that no piece has are neither written nor read. Queries that are padding get finite numbers.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.cache.attend import WHOLE, attend_piece
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name, resident_blocks
from deepseek_trt.plugins.kernels.constants import DecodeConstants, decode_constants
from deepseek_trt.plugins.kernels.latent_write import write_new_tokens
from deepseek_trt.plugins.kernels.launches import cdiv, decode_parts, decode_programs
from deepseek_trt.plugins.kernels.mla_schedule import (
    piece_of_row,
    pieces_before,
    row_of_piece,
    tiles_a_piece,
    tokens_of,
)
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import Tile, decode_combine_tile, decode_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def mla_decode_split(
    query,
    latent,
    pool,
    page_table,
    past_lengths,
    sequence_lengths,
    partial,
    partial_lse,
    attended,
    scale_log2,
    batch,
    steps,
    parts,
    table_width,
    pages,
    H: tl.constexpr,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """One piece for BLOCK_H queries: partial [slots, Q, LAT] and partial_lse [slots, Q], base 2; or attended."""
    after_previous_kernel(PDL)
    capacity, piece = table_width * PAGE, tl.program_id(1)
    share = tiles_a_piece(past_lengths, sequence_lengths, batch, steps, capacity, parts, BLOCK_B, BLOCK_N, MIN_TILES)
    row, before = row_of_piece(past_lengths, sequence_lengths, batch, steps, capacity, share, piece, BLOCK_B, BLOCK_N)
    if row >= batch:
        return
    past, length, start, end = piece_of_row(
        past_lengths, sequence_lengths, row, before, share, steps, capacity, BLOCK_N
    )
    if start >= length:
        return
    if (end == length) & (tl.program_id(0) == 0):
        write_new_tokens(
            pool,
            latent,
            page_table,
            sequence_lengths,
            row,
            past,
            steps,
            table_width,
            pages,
            LAT,
            ROPE,
            PAGE,
            BLOCK_L,
            BLOCK_R,
            BLOCK_S,
        )
    attend_piece(
        query,
        latent,
        pool,
        pool,
        page_table,
        partial,
        partial_lse,
        attended,
        scale_log2,
        row,
        past,
        length,
        start,
        end,
        steps,
        table_width,
        pages,
        H,
        LAT,
        ROPE,
        PAGE,
        BLOCK_L,
        BLOCK_R,
        BLOCK_H,
        BLOCK_N,
        WHOLE,
        LAT,
        1,
        BLOCK_L,
    )


@triton.jit
def mla_decode_combine(
    partial,
    partial_lse,
    past_lengths,
    sequence_lengths,
    attended,
    batch,
    steps,
    parts,
    capacity,
    H: tl.constexpr,
    LAT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_D numbers of one query's output: its pieces' results, weighted by their softmax sums."""
    after_previous_kernel(PDL)
    head = tl.program_id(0)  # of all B * S * H
    row = head // (steps * H)
    share = tiles_a_piece(past_lengths, sequence_lengths, batch, steps, capacity, parts, BLOCK_B, BLOCK_N, MIN_TILES)
    _, length = tokens_of(past_lengths, sequence_lengths, row, True, steps, capacity)
    tiles = tl.cdiv(length, BLOCK_N)
    pieces = tl.cdiv(tiles, share)
    pieces = tl.cdiv(tiles, tl.cdiv(tiles, pieces))
    if pieces == 1:
        return  # written already
    before = pieces_before(past_lengths, sequence_lengths, row, steps, capacity, share, BLOCK_B, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < LAT
    slot = before.to(tl.int64) * steps * H + head % (steps * H)  # of the first piece; then S * H on each
    offs_all = tl.arange(0, MAX_PIECES)
    lse = tl.load(partial_lse + slot + offs_all * (steps * H), mask=offs_all < pieces, other=-float("inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)

    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, pieces, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask_s = offs_s < pieces
        slots = slot + offs_s * (steps * H)
        weight = tl.exp2(tl.load(partial_lse + slots, mask=mask_s, other=-float("inf")) - top)
        part_ptrs = partial + slots[:, None] * LAT + offs_d[None, :]
        part = tl.load(part_ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)

    out_ptrs = attended + head.to(tl.int64) * LAT + offs_d
    tl.store(out_ptrs, (acc / total).to(attended.dtype.element_ty), mask=mask_d)


def run(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    """What export.ops.mla_decode.mla_decode computes, by the kernels: attended [B, S, H, L] and the present pool."""
    present = past_latent.clone().contiguous()
    heads, width, page_size = query.shape[2], query.shape[3], past_latent.shape[1]
    constants = decode_constants(heads, kv_lora_rank, width - kv_lora_rank, page_size)
    tile = decode_tile(dtype_name(query), heads, chip_of(query), page_table.shape[1] * page_size, page_size)
    pools, lengths = (latent.contiguous(), present), (past_lengths, sequence_lengths)
    split = Split(mla_decode_split, pools, constants, tile, page_size)
    return launch_split(split, query, page_table, lengths, scale, kv_lora_rank), present


@dataclass(frozen=True)
class Split:
    """A split kernel, what it takes between the query and the page table, and what it and the combine are told."""

    kernel: Any
    memory: tuple[Tensor, ...]
    constants: DecodeConstants
    tile: Tile
    page_size: int


def launch_split(
    split: Split, query: Tensor, page_table: Tensor, lengths: tuple[Tensor, Tensor], scale: float, rank: int
) -> Tensor:
    """Launch it and the combine: attended [B, S, H, rank]."""
    import torch

    batch, steps, heads, _ = query.shape
    tile, sm = split.tile, chip_of(query)
    tiles = cdiv(steps * heads, tile["BLOCK_H"])
    parts = decode_parts(decode_programs(resident_blocks(query), tiles), batch)
    slots = parts + batch
    partial = query.new_empty((slots, steps * heads, rank), dtype=torch.float32)
    partial_lse = query.new_empty((slots, steps * heads), dtype=torch.float32)
    attended = query.new_empty((batch, steps, heads, rank))
    split.kernel[(tiles, slots)](
        query.contiguous(),
        *split.memory,
        page_table.contiguous(),
        *lengths,
        partial,
        partial_lse,
        attended,
        scale * math.log2(math.e),
        batch,
        steps,
        parts,
        page_table.shape[1],
        split.memory[-1].shape[0],
        **split.constants.split,
        **tile.launch_options(),
    )
    combine = decode_combine_tile(rank, sm)
    mla_decode_combine[(batch * steps * heads, cdiv(rank, combine["BLOCK_D"]))](
        partial,
        partial_lse,
        *lengths,
        attended,
        batch,
        steps,
        parts,
        page_table.shape[1] * split.page_size,
        **split.constants.combine,
        BLOCK_N=tile["BLOCK_N"],
        **combine.launch_options(),
    )
    return attended
