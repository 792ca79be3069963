"""New latents into the pools of a narrow cache, in place, as codes and scales: the first launch of both MLA ops.

Launch, on memory that already holds past_latent and past_rope (where an output is not its past's own memory, copy it
first):

    latent_narrow   grid (cdiv(S, BLOCK_S), B, 1)
        codes *i8 [P, page, L], rope *T [P, page, R + L / group], latent *T [B, S, D], page_table *i32 [B, M],
        past_lengths *i32 [B], sequence_lengths *i32 [B], steps i32 = S, table_width i32 = M, pages i32 = P
    No workspace.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.plugins.kernels.bounds import clamp_int, page_of
from deepseek_trt.plugins.kernels.cache.codes import narrowed
from deepseek_trt.plugins.kernels.cache.constants import narrow_write_constants, narrow_write_tile
from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.order import after_previous_kernel

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def latent_narrow(
    codes,
    rope,
    latent,
    page_table,
    past_lengths,
    sequence_lengths,
    steps,
    table_width,
    pages,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Narrow BLOCK_S rows of one sequence. Padding rows share page 0: what they write there is never read."""
    after_previous_kernel(PDL)
    D: tl.constexpr = LAT + ROPE
    GROUPS: tl.constexpr = LAT // GROUP
    row = tl.program_id(1)
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_l = tl.arange(0, BLOCK_G * BLOCK_GROUP)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    mask_s = offs_s < steps
    capacity = table_width * PAGE
    past = clamp_int(tl.load(past_lengths + row), capacity)
    real_s = offs_s < clamp_int(tl.load(sequence_lengths + row), tl.minimum(steps, capacity - past))

    position = past + offs_s
    page = page_of(page_table, row, position // PAGE, table_width, pages, real_s)
    target = page * PAGE + position % PAGE
    source = latent + ((row.to(tl.int64) * steps + offs_s) * D)[:, None]

    mask_l = mask_s[:, None] & (offs_l < LAT)[None, :]
    latents = tl.load(source + offs_l[None, :], mask=mask_l, other=0.0).to(tl.float32)
    new_codes, scales = narrowed(latents, rope.dtype.element_ty, BLOCK_G, BLOCK_GROUP, FORMAT)
    tl.store(codes + (target * LAT)[:, None] + offs_l[None, :], new_codes, mask=mask_l)
    rest = rope + (target * (ROPE + GROUPS))[:, None]
    mask_r = mask_s[:, None] & (offs_r < ROPE)[None, :]
    tl.store(rest + offs_r[None, :], tl.load(source + LAT + offs_r[None, :], mask=mask_r), mask=mask_r)
    tl.store(rest + ROPE + offs_g[None, :], scales, mask=mask_s[:, None] & (offs_g < GROUPS)[None, :])


def write(
    pools: tuple[Tensor, Tensor],
    latent: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    cache: NarrowCache,
) -> tuple[Tensor, Tensor]:
    """Copies of both pools [P, page, ..] with `latent` [B, S, D] written."""
    codes, rope = (pool.clone().contiguous() for pool in pools)
    batch, steps, width = latent.shape
    tile = narrow_write_tile(steps, chip_of(latent))
    latent_narrow[(cdiv(steps, tile["BLOCK_S"]), batch)](
        codes,
        rope,
        latent.contiguous(),
        page_table.contiguous(),
        past_lengths,
        sequence_lengths,
        steps,
        page_table.shape[1],
        codes.shape[0],
        **narrow_write_constants(cache, width - cache.rank, codes.shape[1]),
        **tile.launch_options(),
    )
    return codes, rope
