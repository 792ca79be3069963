"""MlaPrefillNarrow: mla_prefill.py's expanded attention over a cache of codes and scales.

Launches, on memory that already holds both pasts; sizes, grids, workspaces and the rest as in mla_prefill.py:

    latent_narrow              as in write.py: new tokens are seen as they were narrowed
    mla_prefill_expand_narrow  grid (cdiv(T, BLOCK_T), heads, B)
        codes *i8 [P, page, L] (present), rope *T [P, page, R + L / group] (present), page_table *i32,
        past_lengths *i32, sequence_lengths *i32, w_uk *T, w_uv *T, k_nope *T, value *T, k_rope *T, first_head i32,
        capacity i32, table_width i32, pages i32, steps i32
    mla_prefill_attend         as in mla_prefill.py
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.plugins.kernels.bounds import clamp_int
from deepseek_trt.plugins.kernels.cache.constants import narrow_expand_tile, narrow_prefill_constants
from deepseek_trt.plugins.kernels.cache.expand import expand_tokens
from deepseek_trt.plugins.kernels.cache.write import write
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.mla_prefill import Expand, launch_heads
from deepseek_trt.plugins.kernels.order import after_previous_kernel

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def mla_prefill_expand_narrow(
    codes,
    rope,
    page_table,
    past_lengths,
    sequence_lengths,
    w_uk,
    w_uv,
    k_nope,
    value,
    k_rope,
    first_head,
    capacity,
    table_width,
    pages,
    steps,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """As mla_prefill_expand. Columns of a step, BLOCK_K, share a scale."""
    after_previous_kernel(PDL)
    row = tl.program_id(2)
    past = clamp_int(tl.load(past_lengths + row), capacity)
    length = past + clamp_int(tl.load(sequence_lengths + row), tl.minimum(steps, capacity - past))
    if tl.program_id(0) * BLOCK_T >= length:
        return
    expand_tokens(
        codes,
        rope,
        page_table,
        w_uk,
        w_uv,
        k_nope,
        value,
        k_rope,
        row,
        length,
        first_head,
        capacity,
        table_width,
        pages,
        LAT,
        ROPE,
        NOPE,
        VALUE,
        PAGE,
        BLOCK_NOPE,
        BLOCK_R,
        BLOCK_V,
        BLOCK_T,
        BLOCK_K,
        FORMAT,
        GROUP,
        LAT,
        ROPE + LAT // GROUP,
    )


def run(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    past_rope: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    format: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What export.ops.cache.mla_prefill_narrow computes, by kernels: attended [B, S, H * V] and both present pools."""
    nope, rank, value_dim = w_uk.shape[1], w_uk.shape[2], w_uv.shape[1]
    cache = NarrowCache(format, rank, group)
    present = write((past_latent, past_rope), latent, page_table, past_lengths, sequence_lengths, cache)
    rope, page_size = query.shape[3] - nope, past_latent.shape[1]
    constants = narrow_prefill_constants(cache, query.shape[2], rope, nope, value_dim, page_size)
    tile = narrow_expand_tile(dtype_name(query), cache, page_table.shape[1] * page_size, chip_of(query))
    expand = Expand(mla_prefill_expand_narrow, present, constants, tile, page_size)
    lengths = past_lengths, sequence_lengths
    return launch_heads(expand, query, page_table, lengths, w_uk, w_uv, scale), *present
