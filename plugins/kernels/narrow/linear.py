"""LinearNarrow: tokens times a matrix of codes, each step's sum scaled in float32. A row's sums may be split along K.

Launches; BLOCK_M, BLOCK_N, UNIT from the variant of the token bucket; K = units * UNIT columns, N rows;
splits = launches.linear_splits(the grid's x, K, BLOCK_K):

    linear_narrow      grid (cdiv(N, BLOCK_N) * cdiv(T, BLOCK_M), splits, 1)
        x *T [T, K], weight *i8, weight_scale *S, output *T [T, N], partial *fp32 (workspace 1), tokens i32 = T,
        rows i32 = N, units i32 = K / UNIT, splits i32
    linear_narrow_sum  grid (cdiv(T * N, BLOCK), 1, 1), only where splits > 1
        partial *fp32, output *T, size i32 = T * N, splits i32

    workspace 1: splits * T * N * 4 bytes where splits > 1, else none: partial is not touched then.
A token's sums are made in the same order in any batch of as many blocks of tokens.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.launches import cdiv, linear_splits
from deepseek_trt.plugins.kernels.narrow.codes import row_bytes, row_scales, step, tokens_at
from deepseek_trt.plugins.kernels.narrow.constants import linear_constants, linear_unit
from deepseek_trt.plugins.kernels.narrow.formats import codes_of, kernel_format
from deepseek_trt.plugins.kernels.narrow.tiles import SUM, linear_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def linear_narrow(
    x,
    weight,
    weight_scale,
    output,
    partial,
    tokens,
    rows,
    units,
    splits,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of the output for BLOCK_M tokens, or one split's part of their sums."""
    EVEN: tl.constexpr = UNIT % BLOCK_K == 0
    columns = units * UNIT
    token_blocks = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    offs_m = program % token_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = program // token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < tokens
    mask_n = offs_n < rows
    x_ptrs = x + offs_m.to(tl.int64)[:, None] * columns
    codes = weight + row_bytes(0, offs_n, rows, columns, FORMAT)
    scales = weight_scale + row_scales(0, offs_n, rows, columns, FORMAT, GROUP)

    each = tl.cdiv(tl.cdiv(columns, BLOCK_K), splits) * BLOCK_K
    first = tl.program_id(1) * each
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first, tl.minimum(first + each, columns), BLOCK_K):
        tile = tokens_at(x_ptrs, k, mask_m, columns, BLOCK_K, EVEN)
        acc = step(acc, tile, codes, scales, k, mask_n, columns, FORMAT, GROUP, BLOCK_K, EVEN)

    mask = mask_m[None, :] & mask_n[:, None]
    at = offs_m.to(tl.int64)[None, :] * rows + offs_n[:, None]
    if splits == 1:
        tl.store(output + at, acc.to(output.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + tl.program_id(1).to(tl.int64) * tokens * rows + at, acc, mask=mask)


@triton.jit
def linear_narrow_sum(partial, output, size, splits, BLOCK: tl.constexpr):
    """The sum of the splits' parts, in their order."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    part = partial + offs
    for _ in range(splits):
        acc += tl.load(part, mask=mask, other=0.0)
        part += size
    tl.store(output + offs, acc.to(output.dtype.element_ty), mask=mask)


def run(x: Tensor, weight: Tensor, weight_scale: Tensor, format: str, group: int) -> Tensor:
    """What export.ops.linear_narrow computes, by the kernels: x @ W^T, [T, out]."""
    kind = kernel_format(format, group)
    (tokens, columns), rows = x.shape, weight.shape[0]
    output = x.new_empty((tokens, rows))
    if tokens == 0:
        return output
    tile = linear_tile(kind, dtype_name(x), tokens, rows, chip_of(x))
    unit = linear_unit(kind, (columns,))
    blocks = cdiv(rows, tile["BLOCK_N"]) * cdiv(tokens, tile["BLOCK_M"])
    splits = linear_splits(blocks, columns, tile["BLOCK_K"])
    partial = x.new_empty((splits if splits > 1 else 0, tokens, rows), dtype=torch.float32)
    linear_narrow[(blocks, splits)](
        x.contiguous(),
        codes_of(weight),
        weight_scale.contiguous(),
        output,
        partial,
        tokens,
        rows,
        columns // unit,
        splits,
        **linear_constants(kind, unit),
        **tile.launch_options(),
    )
    if splits > 1:
        size = tokens * rows
        linear_narrow_sum[(cdiv(size, SUM["BLOCK"]),)](partial, output, size, splits, **SUM.launch_options())
    return output
