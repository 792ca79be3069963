"""MlaValue: from attended latents to values, heads side by side, as the output projection takes them.

Launch, BLOCK_V and BLOCK_T from the variant of the token bucket; T = B * S tokens:

    mla_value  grid (H * cdiv(V, BLOCK_V), cdiv(T, BLOCK_T), 1)
        attended *T [T, H, L], w_uv *T [H, V, L], values *T [B, S, H * V],
        tokens i32 = T
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.absorbed.constants import AbsorbedSizes, tile_for, value_constants, value_tiles
from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.order import after_previous_kernel

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def mla_value(
    attended,
    w_uv,
    values,
    tokens,
    H: tl.constexpr,
    LAT: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_T tokens, BLOCK_V columns of one head's values."""
    after_previous_kernel(PDL)
    COLUMNS: tl.constexpr = (VALUE + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // COLUMNS
    offs_v = tl.program_id(0) % COLUMNS * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_v = offs_v < VALUE
    mask_t = offs_t < tokens
    x_ptrs = attended + (offs_t * H + head)[:, None] * LAT
    w_ptrs = w_uv + (head * VALUE + offs_v)[:, None] * LAT

    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first in range(0, LAT, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < LAT
        x = tl.load(x_ptrs + offs_k[None, :], mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + offs_k[None, :], mask=mask_v[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")

    out = values + (offs_t * H + head)[:, None] * VALUE + offs_v[None, :]
    tl.store(out, acc.to(values.dtype.element_ty), mask=mask_t[:, None] & mask_v[None, :])


def run(attended: Tensor, w_uv: Tensor) -> Tensor:
    """What plugins.fused.mla_value.mla_value computes, by the kernel: values [B, S, H * V]."""
    batch, seq, heads, rank = attended.shape
    tokens, value = batch * seq, w_uv.shape[1]
    values = attended.new_empty((batch, seq, heads * value))
    sizes = AbsorbedSizes(heads, rank, 0, 0, value)
    tile = tile_for(value_tiles(sizes, chip_of(attended)), tokens)
    mla_value[(heads * cdiv(value, tile["BLOCK_V"]), cdiv(tokens, tile["BLOCK_T"]))](
        attended.contiguous(), w_uv.contiguous(), values, tokens, **value_constants(sizes), **tile.launch_options()
    )
    return values
