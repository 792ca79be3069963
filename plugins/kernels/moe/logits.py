"""MoeLayer's first launch: the router's logits, each in SPLITS sums of products that the next launch adds.

The weight is read as it is stored, in the model's dtype: a product of two such numbers is exact in float32, and is
summed in float32. Few tokens make few blocks of experts, so that the width is split as well.

Launch, SPLITS, BLOCK_X and BLOCK_T from the variant of the token bucket:

    moe_logits  grid (cdiv(E, BLOCK_X), SPLITS, cdiv(T, BLOCK_T))
        hidden *T [T, hidden], router_weight *T [E, hidden], partial *fp32 (workspace 1), tokens i32 = T

    workspace 1: SPLITS * T * E * 4 bytes, partial [SPLITS, T, E].
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.order import after_previous_kernel


@triton.jit
def moe_logits(
    hidden,
    router_weight,
    partial,
    tokens,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_T tokens, BLOCK_X experts, one of SPLITS parts of the width, each of whole BLOCK_K."""
    after_previous_kernel(PDL)
    WIDTH: tl.constexpr = (HIDDEN + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    split = tl.program_id(1)
    offs_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    offs_t = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_x = offs_x < E
    mask_t = offs_t < tokens

    acc = tl.zeros((BLOCK_T, BLOCK_X), tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        offs_k = split * WIDTH + first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < HIDDEN
        x_ptrs = hidden + offs_t[:, None] * HIDDEN + offs_k[None, :]
        w_ptrs = router_weight + offs_x[:, None] * HIDDEN + offs_k[None, :]
        x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_x[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")

    out = (split.to(tl.int64) * tokens + offs_t)[:, None] * E + offs_x[None, :]
    tl.store(partial + out, acc, mask=mask_t[:, None] & mask_x[None, :])
