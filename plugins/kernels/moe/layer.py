"""MoeLayer, called as its plugin calls it: logits, choice and order, gate and up, down, weighted sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.launches import cdiv, dispatch_blocks
from deepseek_trt.plugins.kernels.moe.choose import moe_choose
from deepseek_trt.plugins.kernels.moe.constants import Choice, LayerSizes, layer_constants, routing_buckets
from deepseek_trt.plugins.kernels.moe.experts import moe_layer_down, moe_layer_gate_up
from deepseek_trt.plugins.kernels.moe.logits import moe_logits
from deepseek_trt.plugins.kernels.moe_dispatch import Dispatch, dispatch
from deepseek_trt.plugins.kernels.moe_experts import moe_combine
from deepseek_trt.plugins.kernels.tiles import ExpertsShape, combine_tile, gemm_tiles

if TYPE_CHECKING:
    from torch import Tensor


def run(
    hidden: Tensor,
    router_weight: Tensor,
    correction_bias: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    biased: int,
) -> Tensor:
    """What plugins.fused.moe_layer.moe_layer computes, by the kernels: the layer's output, [T, hidden]."""
    tokens, width = hidden.shape
    experts, inter = gate_proj.shape[:2]
    output = hidden.new_empty((tokens, width))
    if tokens == 0:
        return output
    sm = chip_of(hidden)
    choice = Choice(top_k, n_group, topk_group, norm_topk_prob, bool(biased))
    sizes = LayerSizes(experts, shared_gate.shape[0] // inter, width, inter, choice)
    constants = layer_constants(sizes)
    tiles = gemm_tiles(dtype_name(hidden), ExpertsShape(tokens, top_k, experts, width, inter), sm)
    hidden = hidden.contiguous()
    weights, plan = route(hidden, router_weight, correction_bias, routed_scaling_factor, sizes, tiles.block)
    slots = tokens * sizes.slots
    where = (plan.sorted_slots, plan.block_expert, slots)
    stacks = [stack.contiguous() for stack in (gate_proj, up_proj, shared_gate, shared_up)]
    expanded = hidden.new_empty((slots, inter))
    moe_layer_gate_up[(plan.blocks * cdiv(inter, tiles.gate_up["BLOCK_N"]),)](
        hidden, *stacks, expanded, *where, **constants.gate_up, **tiles.gate_up.launch_options()
    )
    outer = hidden.new_empty((slots, width))
    moe_layer_down[(plan.blocks * cdiv(width, tiles.down["BLOCK_N"]),)](
        expanded,
        down_proj.contiguous(),
        shared_down.contiguous(),
        outer,
        *where,
        **constants.down,
        **tiles.down.launch_options(),
    )
    combine = combine_tile(tokens, width, sm)
    moe_combine[(cdiv(tokens, combine["BLOCK_T"]), cdiv(width, combine["BLOCK_D"]))](
        outer, weights, output, tokens, **constants.combine, **combine.launch_options()
    )
    return output


def route(
    hidden: Tensor, router_weight: Tensor, correction_bias: Tensor, scale: float, sizes: LayerSizes, block: int
) -> tuple[Tensor, Dispatch]:
    """Weights float32 [T, N] of each token's experts, the shared ones last, and the order of its slots."""
    import torch

    tokens, every = hidden.shape[0], sizes.experts + sizes.shared
    buckets = routing_buckets(sizes, chip_of(hidden))
    bucket = next(b for b in buckets if b.max_tokens == 0 or tokens <= b.max_tokens)
    constants, tile = bucket.logits
    partial = hidden.new_empty((constants["SPLITS"], tokens, sizes.experts), dtype=torch.float32)
    moe_logits[(cdiv(sizes.experts, tile["BLOCK_X"]), constants["SPLITS"], cdiv(tokens, tile["BLOCK_T"]))](
        hidden, router_weight.contiguous(), partial, tokens, **constants, **tile.launch_options()
    )
    constants, tile = bucket.choose
    weights = hidden.new_empty((tokens, sizes.slots), dtype=torch.float32)
    ids = hidden.new_empty((tokens, sizes.slots), dtype=torch.int32)
    blocks = dispatch_blocks(ids.numel(), every, block)
    order = Dispatch(ids.new_empty(blocks * block), ids.new_empty(blocks), block)
    moe_choose[(cdiv(tokens, tile["BLOCK_T"]),)](
        partial,
        correction_bias.float().contiguous(),
        weights,
        ids,
        order.sorted_slots,
        order.block_expert,
        tokens,
        blocks,
        block,
        float(scale),
        **constants,
        **tile.launch_options(),
    )
    return weights, order if tile["SORT"] else dispatch(ids, every, block)
