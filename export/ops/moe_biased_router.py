"""MoeBiasedRouter: the V3 family's choice of experts, by sigmoid scores plus a learned bias, in float32.

The bias takes part in the choice only (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). A group scores as the sum of its
two best biased scores; experts of groups that are not kept count as -inf, since biased scores can be negative. The
weights are the chosen experts' scores without the bias, normalised if wanted, then scaled. Equal scores go to the lower
expert id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def moe_biased_router(
    logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and expert ids int32 [T, K], best biased score first."""
    scores = logits.float().sigmoid()  # [T, E]
    biased = scores + correction_bias
    if topk_group < n_group:
        grouped = biased.unflatten(-1, (n_group, -1))  # [T, G, E/G]
        group_scores = grouped.sort(-1, descending=True).values[..., :2].sum(-1)  # [T, G]
        best_groups = _top(group_scores, topk_group)
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best_groups, False)
        biased = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    ids = _top(biased, top_k)
    weights = scores.gather(1, ids)
    if norm_topk_prob and top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.int()


def _top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k best along the last axis; of equal ones the first (torch.topk promises no order)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _fake(
    logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


_GROUPS_BODY = """
    by_group = Constant <value_ints = [0, {n_group}, -1]> ()
    grouped = Reshape (biased_all, by_group)
    two = Constant <value = int64[1] {{2}}> ()
    best_two, best_two_ids = TopK (grouped, two)
    group_scores = ReduceSum <keepdims = 0> (best_two, two)
    topk_group = Constant <value = int64[1] {{{topk_group}}}> ()
    best_scores, best_groups = TopK (group_scores, topk_group)
    zero = Constant <value_float = 0.0> ()
    nothing = Mul (group_scores, zero)
    lowest = Constant <value_float = -3.0e38> ()
    all_dropped = Add (nothing, lowest)
    best_zero = Mul (best_scores, zero)
    penalty = ScatterElements <axis = 1> (all_dropped, best_groups, best_zero)
    penalty_3d = Unsqueeze (penalty, two)
    grouped_kept = Add (grouped, penalty_3d)
    all_experts = Constant <value_ints = [0, -1]> ()
    biased = Reshape (grouped_kept, all_experts)
"""
_NORMALISE_BODY = """
    last_axis = Constant <value_ints = [-1]> ()
    total = ReduceSum (chosen, last_axis)
    tiny = Constant <value_float = 1.0e-20> ()
    divisor = Add (total, tiny)
    shares = Div (chosen, divisor)
"""


def _body(attributes: Mapping[str, Any]) -> str:
    limited = attributes["topk_group"] < attributes["n_group"]
    normalised = attributes["norm_topk_prob"] and attributes["top_k"] > 1
    return f"""
    logits_f = Cast <to = 1> (logits)
    scores = Sigmoid (logits_f)
    biased_all = Add (scores, correction_bias)
    {_GROUPS_BODY.format(**attributes) if limited else "biased = Identity (biased_all)"}
    top_k = Constant <value = int64[1] {{{attributes["top_k"]}}}> ()
    best, ids_long = TopK (biased, top_k)
    chosen = GatherElements <axis = 1> (scores, ids_long)
    {_NORMALISE_BODY if normalised else "shares = Identity (chosen)"}
    factor = Constant <value_float = {float(attributes["routed_scaling_factor"])!r}> ()
    weights = Mul (shares, factor)
    ids = Cast <to = 6> (ids_long)
"""


MOE_BIASED_ROUTER = OpSpec(
    name="MoeBiasedRouter",
    doc="Chooses each token's experts by sigmoid scores and a correction bias, and gives their weights.",
    inputs=(
        TensorArg("logits", "float32", ("T", "E"), "router logits"),
        TensorArg("correction_bias", "float32", ("E",), "added to the scores for the choice only"),
    ),
    outputs=(
        TensorArg("weights", "float32", ("T", "K"), "weights of the chosen experts, best biased score first"),
        TensorArg("ids", "int32", ("T", "K"), "the chosen experts, of equal scores the lower id"),
    ),
    attributes=(
        Attribute("top_k", "int", "K, experts a token"),
        Attribute("n_group", "int", "groups of experts; 1 where routing is not limited"),
        Attribute("topk_group", "int", "groups that may be chosen from; n_group where routing is not limited"),
        Attribute("norm_topk_prob", "int", "1: weights sum to one before they are scaled"),
        Attribute("routed_scaling_factor", "float", "the scale of the weights"),
    ),
    reference=moe_biased_router,
    fake=_fake,
    body=_body,
    limits="no plugin yet: ONNX Runtime only",
)
