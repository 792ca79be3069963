"""MoeLayer: the router, its experts and the shared experts of one layer, as one op of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deepseek_trt.export.ops import routing
from deepseek_trt.export.ops.moe_biased_router import moe_biased_router
from deepseek_trt.export.ops.moe_experts import moe_experts
from deepseek_trt.export.ops.moe_router import moe_router
from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def moe_layer(
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
    """The layer's output [T, hidden], as export.model.Moe computes it."""
    logits = F.linear(hidden.float(), router_weight.float())  # [T, E]
    choice = (top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
    weights, ids = moe_biased_router(logits, correction_bias, *choice) if biased else moe_router(logits, *choice)
    routed = moe_experts(hidden, weights, ids, gate_proj, up_proj, down_proj, "silu")
    shared = F.linear(F.silu(F.linear(hidden, shared_gate)) * F.linear(hidden, shared_up), shared_down)
    return routed + shared


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _no_body(attributes: Mapping[str, Any]) -> str:
    raise NotImplementedError("MoeLayer is made while an engine is built, where its plugin is: no graph holds it")


MOE_LAYER = OpSpec(
    name="MoeLayer",
    doc="Routes each token, and sums its chosen experts and the shared ones.",
    inputs=(
        TensorArg("hidden", "T", ("T", "hidden"), "tokens, normalised"),
        TensorArg("router_weight", "T", ("E", "hidden"), "the router's weight"),
        TensorArg(
            "correction_bias", "float32", ("E",), "added to sigmoid scores for the choice; read where biased is 1"
        ),
        TensorArg("gate_proj", "T", ("E", "I", "hidden"), "all experts' gate projections"),
        TensorArg("up_proj", "T", ("E", "I", "hidden"), "all experts' up projections"),
        TensorArg("down_proj", "T", ("E", "hidden", "I"), "all experts' down projections"),
        TensorArg("shared_gate", "T", ("SI", "hidden"), "the shared experts' gate projections, one below the other"),
        TensorArg("shared_up", "T", ("SI", "hidden"), "the shared experts' up projections, one below the other"),
        TensorArg("shared_down", "T", ("hidden", "SI"), "the shared experts' down projections, side by side"),
    ),
    outputs=(TensorArg("output", "T", ("T", "hidden"), "the layer's output, before it is added to what came in"),),
    attributes=(
        *routing.attributes("1: weights sum to one", "the scale of the weights; of softmax if they do not sum to one"),
        Attribute("biased", "int", "1: sigmoid scores, chosen by score plus bias; 0: softmax"),
    ),
    reference=moe_layer,
    fake=_fake,
    body=_no_body,
    limits="stands in engines only; silu; a model with shared experts, without biases in them",
)
