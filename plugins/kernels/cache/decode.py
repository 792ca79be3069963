"""MlaDecodeNarrow: mla_decode.py's split and combine over a cache of codes and scales.

Launches, on memory that already holds both pasts; sizes, grids, workspaces and the rest as in mla_decode.py:

    latent_narrow            as in write.py: new tokens are seen as they were narrowed
    mla_decode_split_narrow  grid (tiles, parts + B, 1)
        query *T [B, S, H, D], codes *i8 [P, page, L] (present), rope *T [P, page, R + L / group] (present),
        page_table *i32, past_lengths *i32, sequence_lengths *i32, partial *fp32, partial_lse *fp32,
        attended *T [B, S, H, L], scale_log2 fp32, batch i32, steps i32, parts i32, table_width i32, pages i32
    mla_decode_combine       as in mla_decode.py
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.plugins.kernels.cache.attend import attend_piece
from deepseek_trt.plugins.kernels.cache.constants import narrow_decode_constants, narrow_decode_tile
from deepseek_trt.plugins.kernels.cache.write import write
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.mla_decode import Split, launch_split
from deepseek_trt.plugins.kernels.mla_schedule import piece_of_row, row_of_piece, tiles_a_piece
from deepseek_trt.plugins.kernels.order import after_previous_kernel

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def mla_decode_split_narrow(
    query,
    codes,
    rope,
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
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """One piece for BLOCK_H queries, as mla_decode_split."""
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
    attend_piece(
        query,
        rope,
        codes,
        rope,
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
        BLOCK_G * BLOCK_GROUP,
        BLOCK_R,
        BLOCK_H,
        BLOCK_N,
        FORMAT,
        GROUP,
        BLOCK_G,
        BLOCK_GROUP,
    )


def run(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    past_rope: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    scale: float,
    kv_lora_rank: int,
    format: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What export.ops.cache.mla_decode_narrow computes, by kernels: attended [B, S, H, L] and both present pools."""
    cache = NarrowCache(format, kv_lora_rank, group)
    present = write((past_latent, past_rope), latent, page_table, past_lengths, sequence_lengths, cache)
    heads, width, page_size = query.shape[2], query.shape[3], past_latent.shape[1]
    constants = narrow_decode_constants(cache, heads, width - kv_lora_rank, page_size)
    tile = narrow_decode_tile(dtype_name(query), heads, chip_of(query), page_table.shape[1] * page_size, page_size)
    split = Split(mla_decode_split_narrow, present, constants, tile, page_size)
    lengths = past_lengths, sequence_lengths
    return launch_split(split, query, page_table, lengths, scale, kv_lora_rank), *present
