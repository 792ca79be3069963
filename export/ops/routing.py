"""What both routers share: attributes, the stable choice of the best, the outputs' shapes, parts of the bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops.spec import Attribute, TensorArg

LOGITS = TensorArg("logits", "float32", ("T", "E"), "router logits")
IDS = TensorArg("ids", "int32", ("T", "K"), "the chosen experts, of equal scores the lower id")


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k best along the last axis; of equal ones the first (torch.topk promises no order)."""
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def normalised(weights: Tensor) -> Tensor:
    """Weights [T, K] that sum to one a token."""
    return weights / (weights.sum(-1, keepdim=True) + 1e-20)


def attributes(norm_topk_prob: str, routed_scaling_factor: str) -> tuple[Attribute, ...]:
    """The attributes of a router; what these two mean differs."""
    return (
        Attribute("top_k", "int", "K, experts per token"),
        Attribute("n_group", "int", "groups of experts; 1 where routing is not limited"),
        Attribute("topk_group", "int", "groups that may be chosen from; n_group where routing is not limited"),
        Attribute("norm_topk_prob", "int", norm_topk_prob),
        Attribute("routed_scaling_factor", "float", routed_scaling_factor),
    )


def fake(logits: Tensor, top_k: int, *_: float) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and ids int32 [T, K], shapes only."""
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def limit_body(scores: str, attributes: Mapping[str, Any], score_groups: str, drop_groups: str) -> str:
    """Statements for `scores` [T, E]: `scores`_all, without the groups that are not among the best.

    `score_groups` computes group_scores [T, G] from grouped [T, G, E/G]; `drop_groups` computes grouped_kept from these
    and best_scores and best_groups [T, topk_group].
    """
    if attributes["topk_group"] >= attributes["n_group"]:
        return f"{scores} = Identity ({scores}_all)"
    return f"""
    by_group = Constant <value_ints = [0, {attributes["n_group"]}, -1]> ()
    grouped = Reshape ({scores}_all, by_group)
    {score_groups}
    topk_group = Constant <value = int64[1] {{{attributes["topk_group"]}}}> ()
    best_scores, best_groups = TopK (group_scores, topk_group)
    {drop_groups}
    all_experts = Constant <value_ints = [0, -1]> ()
    {scores} = Reshape (grouped_kept, all_experts)
"""


def normalise_body(weights: str, attributes: Mapping[str, Any], otherwise: str) -> str:
    """Statements for `weights` [T, K]: chosen, so that they sum to one, or what `otherwise` computes."""
    if not attributes["norm_topk_prob"] or attributes["top_k"] <= 1:
        return f"{weights} = {otherwise}"
    return f"""
    last_axis = Constant <value_ints = [-1]> ()
    total = ReduceSum (chosen, last_axis)
    tiny = Constant <value_float = 1.0e-20> ()
    divisor = Add (total, tiny)
    {weights} = Div (chosen, divisor)
"""
