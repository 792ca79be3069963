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

from deepseek_trt.export.ops import routing
from deepseek_trt.export.ops.spec import OpSpec, TensorArg


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
        _, best_groups = routing.top(group_scores, topk_group)
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best_groups, False)
        biased = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    _, ids = routing.top(biased, top_k)
    weights = scores.gather(1, ids)
    if norm_topk_prob and top_k > 1:
        weights = routing.normalised(weights)
    return weights * routed_scaling_factor, ids.int()


def _fake(logits: Tensor, correction_bias: Tensor, top_k: int, *_: float) -> tuple[Tensor, Tensor]:
    return routing.fake(logits, top_k)


_SCORE_GROUPS = """
    two = Constant <value = int64[1] {2}> ()
    best_two, best_two_ids = TopK (grouped, two)
    group_scores = ReduceSum <keepdims = 0> (best_two, two)
"""
_DROP_GROUPS = """
    zero = Constant <value_float = 0.0> ()
    nothing = Mul (group_scores, zero)
    lowest = Constant <value_float = -3.0e38> ()
    all_dropped = Add (nothing, lowest)
    best_zero = Mul (best_scores, zero)
    penalty = ScatterElements <axis = 1> (all_dropped, best_groups, best_zero)
    penalty_3d = Unsqueeze (penalty, two)
    grouped_kept = Add (grouped, penalty_3d)
"""


def _body(attributes: Mapping[str, Any]) -> str:
    return f"""
    logits_f = Cast <to = 1> (logits)
    scores = Sigmoid (logits_f)
    biased_all = Add (scores, correction_bias)
    {routing.limit_body("biased", attributes, _SCORE_GROUPS, _DROP_GROUPS)}
    top_k = Constant <value = int64[1] {{{attributes["top_k"]}}}> ()
    best, ids_long = TopK (biased, top_k)
    chosen = GatherElements <axis = 1> (scores, ids_long)
    {routing.normalise_body("shares", attributes, "Identity (chosen)")}
    factor = Constant <value_float = {float(attributes["routed_scaling_factor"])!r}> ()
    weights = Mul (shares, factor)
    ids = Cast <to = 6> (ids_long)
"""


MOE_BIASED_ROUTER = OpSpec(
    name="MoeBiasedRouter",
    doc="Chooses each token's experts by sigmoid scores and a correction bias, and gives their weights.",
    inputs=(
        routing.LOGITS,
        TensorArg("correction_bias", "float32", ("E",), "added to the scores for the choice only"),
    ),
    outputs=(
        TensorArg("weights", "float32", ("T", "K"), "weights of the chosen experts, best biased score first"),
        routing.IDS,
    ),
    attributes=routing.attributes("1: weights sum to one before they are scaled", "the scale of the weights"),
    reference=moe_biased_router,
    fake=_fake,
    body=_body,
)
