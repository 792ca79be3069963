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
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import pages_of_tile
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name, resident_blocks
from deepseek_trt.plugins.kernels.constants import decode_constants
from deepseek_trt.plugins.kernels.latent_write import write_new_tokens
from deepseek_trt.plugins.kernels.launches import cdiv, decode_parts, decode_programs
from deepseek_trt.plugins.kernels.mla_schedule import pieces_before, row_of_piece, tiles_a_piece, tokens_of
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import decode_combine_tile, decode_tile

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
    D: tl.constexpr = LAT + ROPE
    capacity = table_width * PAGE
    piece = tl.program_id(1)
    share = tiles_a_piece(past_lengths, sequence_lengths, batch, steps, capacity, parts, BLOCK_B, BLOCK_N, MIN_TILES)
    row, before = row_of_piece(past_lengths, sequence_lengths, batch, steps, capacity, share, piece, BLOCK_B, BLOCK_N)
    if row >= batch:
        return
    past, length = tokens_of(past_lengths, sequence_lengths, row, True, steps, capacity)
    tiles = tl.cdiv(length, BLOCK_N)
    tokens = tl.cdiv(tiles, tl.cdiv(tiles, share)) * BLOCK_N  # of each of the row's pieces
    start = (piece - before) * tokens
    end = tl.minimum(start + tokens, length)
    if start >= length:
        return  # the row's pieces before this one took all tiles
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
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)  # of S * H
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.arange(0, BLOCK_R)
    mask_h = offs_h < steps * H
    last = tl.minimum(past + offs_h // H, length - 1)  # that each query sees
    mask_l = offs_l < LAT
    mask_r = offs_r < ROPE
    head = row.to(tl.int64) * steps * H + offs_h
    q_ptrs = query + head[:, None] * D
    q_latent = tl.load(q_ptrs + offs_l[None, :], mask=mask_h[:, None] & mask_l[None, :], other=0.0)
    q_rope = tl.load(q_ptrs + LAT + offs_r[None, :], mask=mask_h[:, None] & mask_r[None, :], other=0.0)

    top = tl.full((BLOCK_H,), -3.0e38, tl.float32)  # finite: a query may see nothing here
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_L), tl.float32)
    page = pages_of_tile(page_table, row, start, end, table_width, pages, PAGE, BLOCK_N)
    new_rows = latent + row.to(tl.int64) * steps * D
    for first in range(start, end, BLOCK_N):
        next_page = pages_of_tile(page_table, row, first + BLOCK_N, end, table_width, pages, PAGE, BLOCK_N)
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        if PAGE % BLOCK_N == 0:  # the tile's rows lie one after the other, in the page as in `latent`
            offs_t = tl.arange(0, BLOCK_N)
            old_rows = pool + (page * PAGE + first % PAGE) * D
            k_rows = tl.where(offs_t < past - first, old_rows, new_rows + (first - past) * D) + offs_t * D
        else:
            k_rows = tl.where(offs_n < past, pool + (page * PAGE + offs_n % PAGE) * D, new_rows + (offs_n - past) * D)
        k_ptrs = k_rows[:, None]
        k_latent = tl.load(k_ptrs + offs_l[None, :], mask=mask_n[:, None] & mask_l[None, :], other=0.0)
        k_rope = tl.load(k_ptrs + LAT + offs_r[None, :], mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        scores = tl.dot(q_latent, k_latent.T, input_precision="ieee")
        scores = tl.dot(q_rope, k_rope.T, scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
        seen = mask_n[None, :] & (offs_n[None, :] <= last[:, None])
        scores = tl.where(seen, scores * scale_log2, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(k_latent.dtype), k_latent, acc * shrink[:, None], input_precision="ieee")
        top = new_top
        page = next_page

    mask_out = mask_h[:, None] & mask_l[None, :]
    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    if (start == 0) & (end == length):
        out_ptrs = attended + head[:, None] * LAT + offs_l[None, :]
        tl.store(out_ptrs, (acc / divisor).to(attended.dtype.element_ty), mask=mask_out)
    else:
        slot = piece.to(tl.int64) * steps * H + offs_h
        tl.store(partial + slot[:, None] * LAT + offs_l[None, :], acc / divisor, mask=mask_out)
        tl.store(partial_lse + slot, top + tl.log2(total), mask=mask_h)


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
    import torch

    present = past_latent.clone().contiguous()
    batch, steps, heads, width = query.shape
    page_size = past_latent.shape[1]
    constants = decode_constants(heads, kv_lora_rank, width - kv_lora_rank, page_size)
    capacity = page_table.shape[1] * page_size
    sm = chip_of(query)
    tile = decode_tile(dtype_name(query), heads, sm, capacity, page_size)
    tiles = cdiv(steps * heads, tile["BLOCK_H"])
    parts = decode_parts(decode_programs(resident_blocks(query), tiles), batch)
    slots = parts + batch
    partial = query.new_empty((slots, steps * heads, kv_lora_rank), dtype=torch.float32)
    partial_lse = query.new_empty((slots, steps * heads), dtype=torch.float32)
    attended = query.new_empty((batch, steps, heads, kv_lora_rank))
    mla_decode_split[(tiles, slots)](
        query.contiguous(),
        latent.contiguous(),
        present,
        page_table.contiguous(),
        past_lengths,
        sequence_lengths,
        partial,
        partial_lse,
        attended,
        scale * math.log2(math.e),
        batch,
        steps,
        parts,
        page_table.shape[1],
        past_latent.shape[0],
        **constants.split,
        **tile.launch_options(),
    )
    combine = decode_combine_tile(kv_lora_rank, sm)
    mla_decode_combine[(batch * steps * heads, cdiv(kv_lora_rank, combine["BLOCK_D"]))](
        partial,
        partial_lse,
        past_lengths,
        sequence_lengths,
        attended,
        batch,
        steps,
        parts,
        capacity,
        **constants.combine,
        BLOCK_N=tile["BLOCK_N"],
        **combine.launch_options(),
    )
    return attended, present
