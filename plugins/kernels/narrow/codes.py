"""Codes as numbers in registers, exact, and the product of a step of codes with tokens.

Integer arithmetic and one addition or multiplication in float32 make the number: no conversion instruction is needed,
of which a chip does few a cycle, nor a type that chips before SM 89 lack. Every code is exact in float16 and bfloat16,
so that rounding a number to the tokens' dtype changes nothing. Scales are applied to sums in float32.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.narrow.formats import FP8_CODE, INT4_CODE, INT8_CODE

INT8 = tl.constexpr(INT8_CODE)
INT4 = tl.constexpr(INT4_CODE)
FP8 = tl.constexpr(FP8_CODE)


@triton.jit
def from_biased(unsigned, bias: tl.constexpr):
    """Whole numbers below 2^23, less `bias`, in float32: 0x4B000000 is 2^23, whose last bit counts ones."""
    return (unsigned | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + bias)


@triton.jit
def from_e4m3(bits):
    """The float32 of E4M3FN codes: sign, exponent and mantissa in their places, and the exponent's bias made up for.

    A code whose exponent is 0 is a denormal of float32 on the way, which the multiplication makes whole. The two codes
    of NaN, which no bundle holds, give 480 and -480.
    """
    return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def product(codes, x, acc, FORMAT: tl.constexpr):
    """The sum of acc [N, M] and codes times tokens: codes of 8 bits [N, K], or bytes of two [N, K/2]; x [M, K]."""
    bits = codes.to(tl.uint8, bitcast=True).to(tl.uint32)
    if FORMAT == INT4:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        low, high = from_biased(bits & 15, 8.0), from_biased(bits >> 4, 8.0)
        acc = tl.dot(low.to(x.dtype), even.T, acc, input_precision="ieee")
        acc = tl.dot(high.to(x.dtype), odd.T, acc, input_precision="ieee")
    else:
        numbers = from_e4m3(bits) if FORMAT == FP8 else from_biased(bits ^ 0x80, 128.0)
        acc = tl.dot(numbers.to(x.dtype), x.T, acc, input_precision="ieee")
    return acc


@triton.jit
def tokens_at(row_ptrs, first, mask_m, COLUMNS, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Columns `first` to `first` + BLOCK_K of tokens, [M, BLOCK_K]; EVEN: none of them is beyond COLUMNS."""
    offs = first + tl.arange(0, BLOCK_K)
    mask = mask_m[:, None]
    if not EVEN:
        mask = mask & (offs < COLUMNS)[None, :]
    return tl.load(row_ptrs + offs[None, :], mask=mask, other=0.0)


@triton.jit
def row_bytes(matrix, offs_n, ROWS, COLUMNS, FORMAT: tl.constexpr):
    """Where the codes of rows offs_n lie in a stack of matrices [ROWS, COLUMNS], int64."""
    columns = COLUMNS // 2 if FORMAT == INT4 else COLUMNS
    return (matrix * ROWS + offs_n).to(tl.int64) * columns


@triton.jit
def row_scales(matrix, offs_n, ROWS, COLUMNS, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """Where the scales of rows offs_n lie: of E4M3 those of their block of GROUP rows."""
    SHARED: tl.constexpr = GROUP if FORMAT == FP8 else 1
    row = matrix * ((ROWS + SHARED - 1) // SHARED) + offs_n // SHARED
    return row.to(tl.int64) * ((COLUMNS + GROUP - 1) // GROUP)


@triton.jit
def step(
    acc,
    x,
    code_ptrs,
    scale_ptrs,
    first,
    mask_n,
    COLUMNS,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The sum of acc [N, M] and the product of the weight's columns `first` to `first` + BLOCK_K with tokens
    x [M, BLOCK_K].

    code_ptrs and scale_ptrs [N] point to each row's; the step's columns share a scale.
    """
    PACKED: tl.constexpr = 2 if FORMAT == INT4 else 1
    offs = first // PACKED + tl.arange(0, BLOCK_K // PACKED)
    mask = mask_n[:, None]
    if not EVEN:
        mask = mask & (offs < COLUMNS // PACKED)[None, :]
    codes = tl.load(code_ptrs[:, None] + offs[None, :], mask=mask, other=0)
    scale = tl.load(scale_ptrs + first // GROUP, mask=mask_n, other=0.0).to(tl.float32)
    return acc + product(codes, x, tl.zeros_like(acc), FORMAT) * scale[:, None]
