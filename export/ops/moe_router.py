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

from deepseek_trt.export.ops import routing
from deepseek_trt.export.ops.spec import OpSpec, TensorArg


def moe_router(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and expert ids int32 [T, K], best first."""
    scores = logits.float().softmax(-1)  # [T, E]
    if topk_group < n_group:
        grouped = scores.unflatten(-1, (n_group, -1))  # [T, G, E/G]
        _, best_groups = routing.top(grouped.amax(-1), topk_group)
        keep = torch.zeros_like(grouped[..., 0]).scatter(1, best_groups, 1.0)
        scores = (grouped * keep[..., None]).flatten(1)
    weights, ids = routing.top(scores, top_k)
    weights = routing.normalised(weights) if norm_topk_prob and top_k > 1 else weights * routed_scaling_factor
    return weights, ids.int()


_SCORE_GROUPS = """
    axis_2 = Constant <value_ints = [2]> ()
    group_scores = ReduceMax <keepdims = 0> (grouped, axis_2)
"""
_DROP_GROUPS = """
    nothing = Mul (group_scores, zero)
    best_zero = Mul (best_scores, zero)
    ones = Add (best_zero, one)
    keep = ScatterElements <axis = 1> (nothing, best_groups, ones)
    keep_3d = Unsqueeze (keep, axis_2)
    grouped_kept = Mul (grouped, keep_3d)
"""


def _body(attributes: Mapping[str, Any]) -> str:
    return f"""
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    logits_f = Cast <to = 1> (logits)
    scores_all = Softmax <axis = -1> (logits_f)
    {routing.limit_body("scores", attributes, _SCORE_GROUPS, _DROP_GROUPS)}
    top_k = Constant <value = int64[1] {{{attributes["top_k"]}}}> ()
    chosen, ids_long = TopK (scores, top_k)
    factor = Constant <value_float = {float(attributes["routed_scaling_factor"])!r}> ()
    {routing.normalise_body("weights", attributes, "Mul (chosen, factor)")}
    ids = Cast <to = 6> (ids_long)
"""


MOE_ROUTER = OpSpec(
    name="MoeRouter",
    doc="Chooses each token's experts and their weights.",
    inputs=(routing.LOGITS,),
    outputs=(TensorArg("weights", "float32", ("T", "K"), "weights of the chosen experts, best first"), routing.IDS),
    attributes=routing.attributes(
        "1: weights sum to one; 0: they are scaled", "the scale where weights are not normalised"
    ),
    reference=moe_router,
    fake=routing.fake,
    body=_body,
)
