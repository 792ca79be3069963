"""MoeExpertsNarrow: moe_experts' steps over stacks of codes, each step's sum scaled in float32.

The intermediate [T * K, I] and the experts' outputs [T * K, hidden] are rounded to the model's dtype once each, as
moe_experts rounds them; codes and scales are exact.

Launches, n = T * K slots; BLOCK_M, BLOCK_N from the variants of the same token bucket (T chooses it); first
moe_dispatch's three with block = BLOCK_M, then:

    moe_gate_up_narrow   grid (blocks * cdiv(I, BLOCK_N), 1, 1)
        hidden *T [T, hidden], gate_proj *i8, gate_proj_scale *S, up_proj *i8, up_proj_scale *S, inner *T (workspace 5),
        sorted_slots *i32, block_expert *i32, slots i32 = n
    moe_down_narrow      grid (blocks * cdiv(hidden, BLOCK_N), 1, 1)
        inner *T, down_proj *i8, down_proj_scale *S, outer *T (workspace 6), sorted_slots *i32, block_expert *i32,
        slots i32 = n

and moe_combine, as moe_experts does; the workspaces are as there. Both kernels of one bucket have the same BLOCK_M.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.moe_dispatch import dispatch
from deepseek_trt.plugins.kernels.moe_experts import moe_combine, place_in_grid
from deepseek_trt.plugins.kernels.narrow.codes import row_bytes, row_scales, step, tokens_at
from deepseek_trt.plugins.kernels.narrow.constants import narrow_experts_constants
from deepseek_trt.plugins.kernels.narrow.formats import codes_of, kernel_format
from deepseek_trt.plugins.kernels.narrow.tiles import experts_tiles
from deepseek_trt.plugins.kernels.tiles import ExpertsShape, combine_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def moe_gate_up_narrow(
    hidden,
    gate_proj,
    gate_proj_scale,
    up_proj,
    up_proj_scale,
    inner,
    sorted_slots,
    block_expert,
    slots,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    TOPK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """inner[slot] = silu(x W_gate^T) * (x W_up^T) for the BLOCK_M slots of one block, BLOCK_N columns."""
    EVEN: tl.constexpr = HIDDEN % BLOCK_K == 0
    block, column = place_in_grid(INTER, BLOCK_N, GROUP_M)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(sorted_slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = slot < slots
    mask_n = offs_n < INTER
    x_ptrs = hidden + (slot // TOPK).to(tl.int64)[:, None] * HIDDEN
    codes_at = row_bytes(expert, offs_n, INTER, HIDDEN, FORMAT)
    scales_at = row_scales(expert, offs_n, INTER, HIDDEN, FORMAT, GROUP)

    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        x = tokens_at(x_ptrs, k, mask_m, HIDDEN, BLOCK_K, EVEN)
        gate = step(
            gate, x, gate_proj + codes_at, gate_proj_scale + scales_at, k, mask_n, HIDDEN, FORMAT, GROUP, BLOCK_K, EVEN
        )
        up = step(up, x, up_proj + codes_at, up_proj_scale + scales_at, k, mask_n, HIDDEN, FORMAT, GROUP, BLOCK_K, EVEN)

    product = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = inner + slot.to(tl.int64)[None, :] * INTER + offs_n[:, None]
    tl.store(out_ptrs, product.to(inner.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


@triton.jit
def moe_down_narrow(
    inner,
    down_proj,
    down_proj_scale,
    outer,
    sorted_slots,
    block_expert,
    slots,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """outer[slot] = inner[slot] W_down^T for the BLOCK_M slots of one block, BLOCK_N columns."""
    EVEN: tl.constexpr = INTER % BLOCK_K == 0
    block, column = place_in_grid(HIDDEN, BLOCK_N, GROUP_M)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(sorted_slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = slot < slots
    mask_n = offs_n < HIDDEN
    x_ptrs = inner + slot.to(tl.int64)[:, None] * INTER
    codes = down_proj + row_bytes(expert, offs_n, HIDDEN, INTER, FORMAT)
    scales = down_proj_scale + row_scales(expert, offs_n, HIDDEN, INTER, FORMAT, GROUP)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, INTER, BLOCK_K):
        x = tokens_at(x_ptrs, k, mask_m, INTER, BLOCK_K, EVEN)
        acc = step(acc, x, codes, scales, k, mask_n, INTER, FORMAT, GROUP, BLOCK_K, EVEN)

    out_ptrs = outer + slot.to(tl.int64)[None, :] * HIDDEN + offs_n[:, None]
    tl.store(out_ptrs, acc.to(outer.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


def run(
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_proj: Tensor,
    gate_proj_scale: Tensor,
    up_proj: Tensor,
    up_proj_scale: Tensor,
    down_proj: Tensor,
    down_proj_scale: Tensor,
    activation: str,
    format: str,
    group: int,
) -> Tensor:
    """What export.ops.moe_experts_narrow computes, by the kernels: the weighted sum, [T, hidden]."""
    if activation != "silu":
        raise BackendError(f"the kernels know the activation silu, not {activation!r}: use the ort backend")
    kind = kernel_format(format, group)
    tokens, width = hidden.shape
    experts, inter = gate_proj.shape[:2]
    output = hidden.new_empty((tokens, width))
    if tokens == 0:
        return output
    sm = chip_of(hidden)
    tiles = experts_tiles(kind, dtype_name(hidden), ExpertsShape(tokens, ids.shape[1], experts, width, inter), sm)
    plan = dispatch(ids, experts, tiles.block)
    constants = narrow_experts_constants(kind, width, inter, ids.shape[1])
    inner, outer = hidden.new_empty((ids.numel(), inter)), hidden.new_empty((ids.numel(), width))
    where = (plan.sorted_slots, plan.block_expert, ids.numel())
    moe_gate_up_narrow[(plan.blocks * cdiv(inter, tiles.gate_up["BLOCK_N"]),)](
        hidden.contiguous(),
        codes_of(gate_proj),
        gate_proj_scale.contiguous(),
        codes_of(up_proj),
        up_proj_scale.contiguous(),
        inner,
        *where,
        **constants.gate_up,
        **tiles.gate_up.launch_options(),
    )
    moe_down_narrow[(plan.blocks * cdiv(width, tiles.down["BLOCK_N"]),)](
        inner,
        codes_of(down_proj),
        down_proj_scale.contiguous(),
        outer,
        *where,
        **constants.down,
        **tiles.down.launch_options(),
    )
    combine = combine_tile(tokens, width, sm)
    moe_combine[(cdiv(tokens, combine["BLOCK_T"]), cdiv(width, combine["BLOCK_D"]))](
        outer, weights.float().contiguous(), output, tokens, **constants.combine, **combine.launch_options()
    )
    return output
