"""MoeExperts: dispatch, grouped gate and up GEMM with SiLU, grouped down GEMM, weighted sum.

The intermediate [T * K, I] is rounded to the model's dtype once, after silu(gate) * up in float32; torch rounds gate,
its activation and up as well, so this is the more exact of the two. The experts' outputs [T * K, hidden] are rounded
once too, as in torch, and are weighted and summed in float32: no partial sum is ever rounded.

Launches, n = T * K slots; BLOCK_M, BLOCK_N from the variants of the same token bucket (T chooses it); first
moe_dispatch's three with block = BLOCK_M, then:

    moe_gate_up   grid (blocks * cdiv(I, BLOCK_N), 1, 1)
        hidden *T [T, hidden], gate_proj *T [E, I, hidden], up_proj *T [E, I, hidden], inner *T (workspace 5),
        sorted_slots *i32, block_expert *i32, slots i32 = n
    moe_down      grid (blocks * cdiv(hidden, BLOCK_N), 1, 1)
        inner *T, down_proj *T [E, hidden, I], outer *T (workspace 6), sorted_slots *i32, block_expert *i32,
        slots i32 = n
    moe_combine   grid (cdiv(T, BLOCK_T), cdiv(hidden, BLOCK_D), 1)
        outer *T, weights *fp32 [T, K], output *T [T, hidden], tokens i32 = T

    workspace 5: n * I * sizeof(T) bytes; workspace 6: n * hidden * sizeof(T); each rounded up to 256.
    moe_gate_up and moe_down of one bucket have the same BLOCK_M.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.constants import experts_constants
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.moe_dispatch import dispatch
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import ExpertsShape, combine_tile, gemm_tiles

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def place_in_grid(N: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of rows and of columns of this program: GROUP_M row blocks side by side share the weights in L2."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    rows = tl.num_programs(0) // COLUMNS
    first = program // (GROUP_M * COLUMNS) * GROUP_M
    size = tl.minimum(rows - first, GROUP_M)
    within = program % (GROUP_M * COLUMNS)
    return first + within % size, within // size


@triton.jit
def gate_up_tile(
    hidden,
    gate_proj,
    up_proj,
    inner,
    slot,
    slots,
    first_row,
    column,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """inner[slot] = silu(x W_gate^T) * (x W_up^T) for BLOCK_M slots, BLOCK_N columns; W starts at row first_row."""
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = slot < slots
    mask_n = offs_n < INTER
    x_ptrs = hidden + (slot // TOPK).to(tl.int64)[:, None] * HIDDEN
    gate_ptrs = gate_proj + (first_row + offs_n)[:, None] * HIDDEN
    up_ptrs = up_proj + (first_row + offs_n)[:, None] * HIDDEN

    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, HIDDEN, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < HIDDEN
        x = tl.load(x_ptrs + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w_gate = tl.load(gate_ptrs + offs_k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        w_up = tl.load(up_ptrs + offs_k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        gate = tl.dot(x, w_gate.T, gate, input_precision="ieee")
        up = tl.dot(x, w_up.T, up, input_precision="ieee")

    product = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = inner + slot.to(tl.int64)[:, None] * INTER + offs_n[None, :]
    tl.store(out_ptrs, product.to(inner.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def moe_gate_up(
    hidden,
    gate_proj,
    up_proj,
    inner,
    sorted_slots,
    block_expert,
    slots,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    TOPK: tl.constexpr,
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
    gate_up_tile(
        hidden,
        gate_proj,
        up_proj,
        inner,
        slot,
        slots,
        expert * INTER,
        column,
        HIDDEN,
        INTER,
        TOPK,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def down_tile(
    inner,
    weight,
    row_stride,
    outer,
    slot,
    slots,
    column,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """outer[slot] = inner[slot] W^T for BLOCK_M slots, BLOCK_N columns; W's rows lie row_stride apart."""
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = slot < slots
    mask_n = offs_n < HIDDEN
    x_ptrs = inner + slot.to(tl.int64)[:, None] * INTER
    w_ptrs = weight + offs_n.to(tl.int64)[:, None] * row_stride

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, INTER, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < INTER
        x = tl.load(x_ptrs + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + offs_k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")

    out_ptrs = outer + slot.to(tl.int64)[:, None] * HIDDEN + offs_n[None, :]
    tl.store(out_ptrs, acc.to(outer.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def moe_down(
    inner,
    down_proj,
    outer,
    sorted_slots,
    block_expert,
    slots,
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
    weight = down_proj + expert * HIDDEN * INTER
    down_tile(inner, weight, INTER, outer, slot, slots, column, HIDDEN, INTER, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def moe_combine(
    outer,
    weights,
    output,
    tokens,
    HIDDEN: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """output[t] = the sum over k of weights[t, k] * outer[t * TOPK + k], in float32."""
    after_previous_kernel(PDL)
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < tokens
    mask = mask_t[:, None] & (offs_d < HIDDEN)[None, :]

    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(TOPK):
        slot = offs_t * TOPK + k
        weight = tl.load(weights + slot, mask=mask_t, other=0.0)
        part = tl.load(outer + slot[:, None] * HIDDEN + offs_d[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * part.to(tl.float32)

    tl.store(output + offs_t[:, None] * HIDDEN + offs_d[None, :], acc.to(output.dtype.element_ty), mask=mask)


def run(
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
) -> Tensor:
    """What export.ops.moe_experts.moe_experts computes, by the kernels: the weighted sum, [T, hidden]."""
    if activation != "silu":
        raise BackendError(f"the kernels know the activation silu, not {activation!r}: use the ort backend")
    tokens, width = hidden.shape
    experts, inter = gate_proj.shape[:2]
    output = hidden.new_empty((tokens, width))
    if tokens == 0:
        return output
    sm = chip_of(hidden)
    tiles = gemm_tiles(dtype_name(hidden), ExpertsShape(tokens, ids.shape[1], experts, width, inter), sm)
    plan = dispatch(ids, experts, tiles.block)
    constants = experts_constants(width, inter, ids.shape[1])
    inner = hidden.new_empty((ids.numel(), inter))
    where = (plan.sorted_slots, plan.block_expert, ids.numel())
    moe_gate_up[(plan.blocks * cdiv(inter, tiles.gate_up["BLOCK_N"]),)](
        hidden.contiguous(),
        gate_proj.contiguous(),
        up_proj.contiguous(),
        inner,
        *where,
        **constants.gate_up,
        **tiles.gate_up.launch_options(),
    )
    outer = hidden.new_empty((ids.numel(), width))
    moe_down[(plan.blocks * cdiv(width, tiles.down["BLOCK_N"]),)](
        inner, down_proj.contiguous(), outer, *where, **constants.down, **tiles.down.launch_options()
    )
    combine = combine_tile(tokens, width, sm)
    moe_combine[(cdiv(tokens, combine["BLOCK_T"]), cdiv(width, combine["BLOCK_D"]))](
        outer, weights.float().contiguous(), output, tokens, **constants.combine, **combine.launch_options()
    )
    return output
