"""MlaValue: from decode's attended latents to values, as one op of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops.spec import OpSpec, TensorArg


def mla_value(attended: Tensor, w_uv: Tensor) -> Tensor:
    """Values [B, S, H * V] of attended latents [B, S, H, L], as export.model.Attention computes them."""
    return torch.einsum("bshl,hvl->bshv", attended, w_uv).flatten(2)


def _fake(attended: Tensor, w_uv: Tensor) -> Tensor:
    heads, value = w_uv.shape[:2]
    return attended.new_empty((*attended.shape[:2], heads * value))


def _no_body(attributes: Mapping[str, Any]) -> str:
    raise NotImplementedError("MlaValue is made while an engine is built, where its plugin is: no graph holds it")


MLA_VALUE = OpSpec(
    name="MlaValue",
    doc="Multiplies each head's attended latents with its W_UV.",
    inputs=(
        TensorArg("attended", "T", ("B", "S", "H", "L"), "attended latents"),
        TensorArg("w_uv", "T", ("H", "V", "L"), "from latents to values"),
    ),
    outputs=(TensorArg("values", "T", ("B", "S", "H*V"), "values, heads side by side"),),
    attributes=(),
    reference=mla_value,
    fake=_fake,
    body=_no_body,
    limits="stands in engines only",
)
