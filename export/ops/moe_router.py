"""MoeRouter: from router logits to the chosen experts and their weights, in float32.

greedy takes the top-k of the softmax. group_limited_greedy first keeps the topk_group groups whose best expert scores
highest (DeepSeek-V2, arXiv:2405.04434, section 2.2.2); scores of other groups count as 0.0. Then the weights are either
normalised or scaled, never both. Equal scores go to the lower expert id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def moe_router(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and expert ids int32 [T, K], best first."""
    scores = logits.float().softmax(-1)  # [T, E]
    if topk_group < n_group:
        grouped = scores.unflatten(-1, (n_group, -1))  # [T, G, E/G]
        _, best_groups = _top(grouped.amax(-1), topk_group)
        keep = torch.zeros_like(grouped[..., 0]).scatter(1, best_groups, 1.0)
        scores = (grouped * keep[..., None]).flatten(1)
    weights, ids = _top(scores, top_k)
    if norm_topk_prob and top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    else:
        weights = weights * routed_scaling_factor
    return weights, ids.int()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best along the last axis; of equal ones the first (torch.topk promises no order)."""
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def _fake(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


_GROUPS_BODY = """
    by_group = Constant <value_ints = [0, {n_group}, -1]> ()
    grouped = Reshape (scores_all, by_group)
    axis_2 = Constant <value_ints = [2]> ()
    group_scores = ReduceMax <keepdims = 0> (grouped, axis_2)
    topk_group = Constant <value = int64[1] {{{topk_group}}}> ()
    best_scores, best_groups = TopK (group_scores, topk_group)
    nothing = Mul (group_scores, zero)
    best_zero = Mul (best_scores, zero)
    ones = Add (best_zero, one)
    keep = ScatterElements <axis = 1> (nothing, best_groups, ones)
    keep_3d = Unsqueeze (keep, axis_2)
    grouped_kept = Mul (grouped, keep_3d)
    all_experts = Constant <value_ints = [0, -1]> ()
    scores = Reshape (grouped_kept, all_experts)
"""
_NORMALISE_BODY = """
    last_axis = Constant <value_ints = [-1]> ()
    total = ReduceSum (chosen, last_axis)
    tiny = Constant <value_float = 1.0e-20> ()
    divisor = Add (total, tiny)
    weights = Div (chosen, divisor)
"""


def _body(attributes: Mapping[str, Any]) -> str:
    limited = attributes["topk_group"] < attributes["n_group"]
    normalised = attributes["norm_topk_prob"] and attributes["top_k"] > 1
    return f"""
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    logits_f = Cast <to = 1> (logits)
    scores_all = Softmax <axis = -1> (logits_f)
    {_GROUPS_BODY.format(**attributes) if limited else "scores = Identity (scores_all)"}
    top_k = Constant <value = int64[1] {{{attributes["top_k"]}}}> ()
    chosen, ids_long = TopK (scores, top_k)
    factor = Constant <value_float = {float(attributes["routed_scaling_factor"])!r}> ()
    {_NORMALISE_BODY if normalised else "weights = Mul (chosen, factor)"}
    ids = Cast <to = 6> (ids_long)
"""


MOE_ROUTER = OpSpec(
    name="MoeRouter",
    doc="Chooses each token's experts and their weights.",
    inputs=(TensorArg("logits", "float32", ("T", "E"), "router logits"),),
    outputs=(
        TensorArg("weights", "float32", ("T", "K"), "weights of the chosen experts, best first"),
        TensorArg("ids", "int32", ("T", "K"), "the chosen experts, of equal scores the lower id"),
    ),
    attributes=(
        Attribute("top_k", "int", "K, experts a token"),
        Attribute("n_group", "int", "groups of experts; 1 where routing is not limited"),
        Attribute("topk_group", "int", "groups that may be chosen from; n_group where routing is not limited"),
        Attribute("norm_topk_prob", "int", "1: weights sum to one; 0: they are scaled"),
        Attribute("routed_scaling_factor", "float", "the scale where weights are not normalised"),
    ),
    reference=moe_router,
    fake=_fake,
    body=_body,
)
