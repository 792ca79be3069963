"""MoeExpertsNarrow: MoeExperts over stacks of narrow numbers, products in float32 whatever the model's dtype.

An expert's matrices are picked before they are widened: what is widened at a time is one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops import moe_experts as whole
from deepseek_trt.export.ops import narrow
from deepseek_trt.export.ops.activations import activate
from deepseek_trt.export.ops.spec import OpSpec

_STACKS = ("gate_proj", "up_proj", "down_proj")


def moe_experts_narrow(
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
    """The weighted sum of each token's experts, [T, hidden]."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in ids.unique().tolist():
        tokens, ranks = (ids == expert).nonzero(as_tuple=True)
        x = hidden[tokens].float()
        gate = x @ narrow.widened(gate_proj[expert], gate_proj_scale[expert], format, group).T  # [n, I]
        up = x @ narrow.widened(up_proj[expert], up_proj_scale[expert], format, group).T
        down = narrow.widened(down_proj[expert], down_proj_scale[expert], format, group)  # [hidden, I]
        outer = (activate(activation, gate) * up) @ down.T  # [n, hidden]
        total.index_add_(0, tokens, outer * weights[tokens, ranks, None])
    return total.to(hidden.dtype)


def _fake(hidden: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(hidden)


def _body(attributes: Mapping[str, Any]) -> str:
    picked = "".join(_widened(name, attributes["format"]) for name in _STACKS)
    constants = narrow.constants(attributes["format"], attributes["group"])
    return constants + whole.body(attributes["activation"], "hidden_f", picked)


def _widened(stack: str, format: str) -> str:
    """w_gate of gate_proj, and so on, of the loop's `expert`."""
    return f"""
        {stack}_of_one = Gather <axis = 0> ({stack}, expert)
        {stack}_scale_of_one = Gather <axis = 0> ({stack}_scale, expert)
        {narrow.widen(f"w_{stack.removesuffix('_proj')}", f"{stack}_of_one", f"{stack}_scale_of_one", format)}
    """


MOE_EXPERTS_NARROW = OpSpec(
    name="MoeExpertsNarrow",
    doc="MoeExperts over narrow numbers, in float32.",
    inputs=(
        *whole.TOKENS,
        *narrow.arguments("gate_proj", ("E", "I", "hidden"), "all experts' gate projections"),
        *narrow.arguments("up_proj", ("E", "I", "hidden"), "all experts' up projections"),
        *narrow.arguments("down_proj", ("E", "hidden", "I"), "all experts' down projections"),
    ),
    outputs=(whole.SUM,),
    attributes=(whole.ACTIVATION, *narrow.ATTRIBUTES),
    reference=moe_experts_narrow,
    fake=_fake,
    body=_body,
    limits=f"a plugin exists for silu only; {narrow.LIMITS}",
)
