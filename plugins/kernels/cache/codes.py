"""Latents as codes and scales and back, in registers: export.ops.cache.codes says what of.

No chip needs a type for fp8: its bits are made and read by whole numbers.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.narrow.codes import FP8, from_biased, from_e4m3


@triton.jit
def narrowed(latents, dtype: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_GROUP: tl.constexpr, FORMAT: tl.constexpr):
    """Codes int8 [S, L] and scales [S, BLOCK_G], in `dtype`, of float32 latents [S, L]."""
    TOP: tl.constexpr = 448.0 if FORMAT == FP8 else 127.0
    S: tl.constexpr = latents.shape[0]
    groups = tl.reshape(latents, (S, BLOCK_G, BLOCK_GROUP))
    strange = tl.sum(groups * 0.0, 2)  # 0, or NaN where one is not finite
    largest = tl.max(tl.abs(groups), 2)
    scales = (tl.div_rn(largest, tl.zeros_like(largest) + TOP) + strange).to(dtype)
    steps = scales.to(tl.float32)
    steps = tl.broadcast_to(tl.where(steps == 0.0, 1.0, steps)[:, :, None], (S, BLOCK_G, BLOCK_GROUP))
    ratios = tl.div_rn(groups, steps)
    is_number = ratios == ratios
    ratios = tl.minimum(tl.maximum(tl.where(is_number, ratios, 0.0), -TOP), TOP)
    if FORMAT == FP8:
        codes = tl.where(is_number, to_e4m3(ratios), 0x7F)
    else:
        codes = (ratios + 12582912.0).to(tl.uint32, bitcast=True)  # 1.5 * 2^23, whose last bits then count ones
    return tl.reshape((codes & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True), (S, BLOCK_G * BLOCK_GROUP)), scales


@triton.jit
def to_e4m3(ratios):
    """The E4M3FN codes, in uint32, nearest to numbers of at most 448, ties to even."""
    bits = ratios.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # three bits of mantissa; the exponents' biases differ
    small = (tl.abs(ratios) + 24576.0).to(tl.uint32, bitcast=True) & 0xFF  # 1.5 * 2^14, whose last bit counts 2^-9
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)  # 2^-6


@triton.jit
def numbers_of(codes, FORMAT: tl.constexpr):
    """The float32 of codes, int8."""
    bits = codes.to(tl.uint8, bitcast=True).to(tl.uint32)
    return from_e4m3(bits) if FORMAT == FP8 else from_biased(bits ^ 0x80, 128.0)


@triton.jit
def widened(codes, scales, dtype: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_GROUP: tl.constexpr, FORMAT: tl.constexpr):
    """Latents [N, L] in `dtype` of codes [N, L] and scales [N, BLOCK_G]."""
    N: tl.constexpr = codes.shape[0]
    groups = tl.reshape(numbers_of(codes, FORMAT), (N, BLOCK_G, BLOCK_GROUP))
    latents = groups * scales.to(tl.float32)[:, :, None]
    return tl.reshape(latents, (N, BLOCK_G * BLOCK_GROUP)).to(dtype)
