"""LinearNarrow: tokens times a matrix of narrow numbers, in float32 whatever the model's dtype. A bias is added after.

The body widens the whole matrix: right for any runtime, and slow where it is not done once. Compiled operators read the
codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops import narrow
from deepseek_trt.export.ops.spec import OpSpec, TensorArg


def linear_narrow(x: Tensor, weight: Tensor, weight_scale: Tensor, format: str, group: int) -> Tensor:
    """X @ W^T for x [T, in], W [out, in]."""
    return (x.float() @ narrow.widened(weight, weight_scale, format, group).T).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)


def _body(attributes: Mapping[str, Any]) -> str:
    kind, group = attributes["format"], attributes["group"]
    return f"""
    {narrow.constants(kind, group)}
    {narrow.widen("w", "weight", "weight_scale", kind)}
    x_f = Cast <to = 1> (x)
    output_f = Gemm <transB = 1> (x_f, w)
    output = CastLike (output_f, x)
"""


LINEAR_NARROW = OpSpec(
    name="LinearNarrow",
    doc="Multiplies tokens with a matrix of narrow numbers, in float32.",
    inputs=(
        TensorArg("x", "T", ("T", "in"), "tokens"),
        *narrow.arguments("weight", ("out", "in"), "the matrix"),
    ),
    outputs=(TensorArg("output", "T", ("T", "out"), "the products"),),
    attributes=narrow.ATTRIBUTES,
    reference=linear_narrow,
    fake=_fake,
    body=_body,
    limits=narrow.LIMITS,
)
