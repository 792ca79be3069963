"""MoeLayer's grouped GEMMs: those of moe_experts, whose last experts are the shared ones, with weights of their own.

shared_down [hidden, SHARED * I] holds the shared experts side by side, so that one's rows lie SHARED * I apart.

Launches, BLOCK_M, BLOCK_N from the variants of the token bucket, N = K + SHARED, n = T * N slots:

    moe_layer_gate_up   grid (blocks * cdiv(I, BLOCK_N), 1, 1)
        hidden *T [T, hidden], gate_proj *T [E, I, hidden], up_proj *T [E, I, hidden],
        shared_gate *T [SHARED * I, hidden], shared_up *T [SHARED * I, hidden], inner *T (workspace 8),
        sorted_slots *i32, block_expert *i32, slots i32 = n
    moe_layer_down      grid (blocks * cdiv(hidden, BLOCK_N), 1, 1)
        inner *T, down_proj *T [E, hidden, I], shared_down *T [hidden, SHARED * I], outer *T (workspace 9),
        sorted_slots *i32, block_expert *i32, slots i32 = n

Then moe_experts' moe_combine sums the N slots of a token. workspace 8: n * I * sizeof(T); 9: n * hidden * sizeof(T).
moe_layer_gate_up and moe_layer_down of one bucket have the same BLOCK_M.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.moe_experts import down_tile, gate_up_tile, place_in_grid
from deepseek_trt.plugins.kernels.order import after_previous_kernel


@triton.jit
def moe_layer_gate_up(
    hidden,
    gate_proj,
    up_proj,
    shared_gate,
    shared_up,
    inner,
    sorted_slots,
    block_expert,
    slots,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """inner[slot] = silu(x W_gate^T) * (x W_up^T) for the BLOCK_M slots of one block, BLOCK_N columns."""
    after_previous_kernel(PDL)
    block, column = place_in_grid(INTER, BLOCK_N, GROUP_M)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(sorted_slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_shared = expert >= E
    gate = tl.where(is_shared, shared_gate, gate_proj)
    up = tl.where(is_shared, shared_up, up_proj)
    first_row = tl.where(is_shared, expert - E, expert) * INTER
    gate_up_tile(
        hidden, gate, up, inner, slot, slots, first_row, column, HIDDEN, INTER, SLOTS, BLOCK_M, BLOCK_N, BLOCK_K
    )


@triton.jit
def moe_layer_down(
    inner,
    down_proj,
    shared_down,
    outer,
    sorted_slots,
    block_expert,
    slots,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """outer[slot] = inner[slot] W_down^T for the BLOCK_M slots of one block, BLOCK_N columns."""
    after_previous_kernel(PDL)
    block, column = place_in_grid(HIDDEN, BLOCK_N, GROUP_M)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(sorted_slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_shared = expert >= E
    of_shared = shared_down + (expert - E) * INTER
    weight = tl.where(is_shared, of_shared, down_proj + expert * HIDDEN * INTER)
    row_stride = tl.where(is_shared, SHARED * INTER, INTER)
    down_tile(inner, weight, row_stride, outer, slot, slots, column, HIDDEN, INTER, BLOCK_M, BLOCK_N, BLOCK_K)
