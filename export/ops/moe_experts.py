"""MoeExperts: each token through its chosen experts, and their weighted sum.

An expert is down(act(gate(x)) * up(x)). The sum over a token's experts is kept in float32. Experts that no token chose
are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops.activations import ACTIVATION_BODIES, activate
from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def moe_experts(
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
) -> Tensor:
    """The weighted sum of each token's experts, [T, hidden]."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in ids.unique().tolist():
        tokens, ranks = (ids == expert).nonzero(as_tuple=True)
        x = hidden[tokens]
        inner = activate(activation, x @ gate_proj[expert].T) * (x @ up_proj[expert].T)  # [n, I]
        outer = (inner @ down_proj[expert].T).float()  # [n, hidden]
        total.index_add_(0, tokens, outer * weights[tokens, ranks, None])
    return total.to(hidden.dtype)


def _fake(hidden: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(hidden)


def body(activation: str, hidden: str, picked: str) -> str:
    """The loop over the experts that were chosen.

    `hidden` is the value that an expert's tokens are taken from, of the dtype that is computed in; `picked` makes
    w_gate, w_up and w_down of `expert`.
    """
    return f"""
    everything = Constant <value_ints = [-1]> ()
    last_axis = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    first = Constant <value_int = 0> ()
    ids_long = Cast <to = 7> (ids)
    ids_flat = Reshape (ids_long, everything)
    hit = Unique <sorted = 1> (ids_flat)
    hits_dim = Shape (hit)
    hits = Squeeze (hits_dim)
    hidden_f = Cast <to = 1> (hidden)
    nothing = Mul (hidden_f, zero)
    always = Constant <value = bool {{1}}> ()
    total = Loop (hits, always, nothing) <body = each_hit_expert (int64 turn, bool go, float[T, D] sum_in)
        => (bool go_on, float[T, D] sum_out) {{
        expert = Gather <axis = 0> (hit, turn)
        is_chosen = Equal (ids_long, expert)
        where = NonZero (is_chosen)
        tokens = Gather <axis = 0> (where, first)
        places = Transpose <perm = [1, 0]> (where)
        share = GatherND (weights, places)
        share_column = Unsqueeze (share, last_axis)
        x = Gather <axis = 0> ({hidden}, tokens)
        {picked}
        gate = Gemm <transB = 1> (x, w_gate)
        up = Gemm <transB = 1> (x, w_up)
        {ACTIVATION_BODIES[activation]}
        inner = Mul (activated, up)
        outer = Gemm <transB = 1> (inner, w_down)
        outer_f = Cast <to = 1> (outer)
        weighted = Mul (outer_f, share_column)
        tokens_column = Unsqueeze (tokens, last_axis)
        sum_out = ScatterND <reduction = "add"> (sum_in, tokens_column, weighted)
        go_on = Identity (go)
    }}>
    output = CastLike (total, hidden)
"""


_PICKED = """
        w_gate = Gather <axis = 0> (gate_proj, expert)
        w_up = Gather <axis = 0> (up_proj, expert)
        w_down = Gather <axis = 0> (down_proj, expert)
"""


def _body(attributes: Mapping[str, Any]) -> str:
    return body(attributes["activation"], "hidden", _PICKED)


# What tokens are and where they go, in every op over experts.
TOKENS = (
    TensorArg("hidden", "T", ("T", "hidden"), "tokens"),
    TensorArg("weights", "float32", ("T", "K"), "weights of the chosen experts"),
    TensorArg("ids", "int32", ("T", "K"), "the chosen experts, all different for one token"),
)
SUM = TensorArg("output", "T", ("T", "hidden"), "weighted sum over the chosen experts")
ACTIVATION = Attribute("activation", "string", "of the gate: silu, gelu, gelu_pytorch_tanh or relu")

MOE_EXPERTS = OpSpec(
    name="MoeExperts",
    doc="Runs each token through its chosen experts and sums their outputs, weighted, in float32.",
    inputs=(
        *TOKENS,
        TensorArg("gate_proj", "T", ("E", "I", "hidden"), "all experts' gate projections"),
        TensorArg("up_proj", "T", ("E", "I", "hidden"), "all experts' up projections"),
        TensorArg("down_proj", "T", ("E", "hidden", "I"), "all experts' down projections"),
    ),
    outputs=(SUM,),
    attributes=(ACTIVATION,),
    reference=moe_experts,
    fake=_fake,
    body=_body,
    limits="a plugin exists for silu only; for TensorRT, stacks of 2^31 numbers or more are inputs in parts",
)
