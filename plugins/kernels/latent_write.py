"""New latents into the page pool, in place: MlaPrefill's first launch, and what MlaDecode's first one does beside.

Launch, on memory that already holds past_latent (where the output is not past_latent's own memory, copy it first):

    latent_write   grid (cdiv(S, BLOCK_S), B, 1)
        pool *T [P, page, D], latent *T [B, S, D], page_table *i32 [B, M], past_lengths *i32 [B],
        sequence_lengths *i32 [B], steps i32 = S, table_width i32 = M, pages i32 = P
    No workspace.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import clamp_int, page_of
from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.constants import write_constants
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import write_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def latent_write(
    pool,
    latent,
    page_table,
    past_lengths,
    sequence_lengths,
    steps,
    table_width,
    pages,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Copy BLOCK_S rows of one sequence. Padding rows share page 0: what they write there is never read."""
    after_previous_kernel(PDL)
    row = tl.program_id(1)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s = offs_s < steps
    capacity = table_width * PAGE
    past = clamp_int(tl.load(past_lengths + row), capacity)
    real_s = offs_s < clamp_int(tl.load(sequence_lengths + row), tl.minimum(steps, capacity - past))

    position = past + offs_s
    page = page_of(page_table, row, position // PAGE, table_width, pages, real_s)
    target = page * PAGE + position % PAGE
    source = row.to(tl.int64) * steps + offs_s

    mask = mask_s[:, None] & (offs_d < D)[None, :]
    values = tl.load(latent + source[:, None] * D + offs_d[None, :], mask=mask)
    tl.store(pool + target[:, None] * D + offs_d[None, :], values, mask=mask)


@triton.jit
def write_new_tokens(
    pool,
    latent,
    page_table,
    sequence_lengths,
    row,
    past,
    steps,
    table_width,
    pages,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Copy the new tokens of one sequence that has `past` others, BLOCK_S at a time; padding is written nowhere."""
    D: tl.constexpr = LAT + ROPE
    new = clamp_int(tl.load(sequence_lengths + row), tl.minimum(steps, table_width * PAGE - past))
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.arange(0, BLOCK_R)
    for first in range(0, new, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask_s = offs_s < new
        position = past + offs_s
        page = page_of(page_table, row, position // PAGE, table_width, pages, mask_s)
        source = latent + ((row.to(tl.int64) * steps + offs_s) * D)[:, None]
        target = pool + ((page * PAGE + position % PAGE) * D)[:, None]
        mask = mask_s[:, None] & (offs_l < LAT)[None, :]
        tl.store(target + offs_l[None, :], tl.load(source + offs_l[None, :], mask=mask), mask=mask)
        mask = mask_s[:, None] & (offs_r < ROPE)[None, :]
        tl.store(target + LAT + offs_r[None, :], tl.load(source + LAT + offs_r[None, :], mask=mask), mask=mask)


def write(pool: Tensor, latent: Tensor, page_table: Tensor, past_lengths: Tensor, sequence_lengths: Tensor) -> Tensor:
    """A copy of `pool` [P, page, D] with `latent` [B, S, D] written."""
    batch, steps, width = latent.shape
    present = pool.clone().contiguous()
    tile = write_tile(steps, chip_of(pool))
    latent_write[(cdiv(steps, tile["BLOCK_S"]), batch)](
        present,
        latent.contiguous(),
        page_table.contiguous(),
        past_lengths,
        sequence_lengths,
        steps,
        page_table.shape[1],
        pool.shape[0],
        **write_constants(width, pool.shape[1]),
        **tile.launch_options(),
    )
    return present
