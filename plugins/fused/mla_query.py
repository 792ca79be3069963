"""MlaQuery: from decode's projections to what MlaDecode takes, as one op of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.onnx.ops import rotary_embedding

from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def mla_query(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, latent_norm: Tensor, w_uk: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries [B, S, H, D] and latents [B, S, D], as export.model.Attention computes them for decode."""
    (batch, seq, half), (heads, nope, rank) = cos.shape, w_uk.shape
    q = q.view(batch, seq, heads, nope + 2 * half)
    kv = kv.view(batch, seq, rank + 2 * half)
    q_rope = _rotate(q[..., nope:].flatten(2), cos, sin, heads).view(batch, seq, heads, 2 * half)
    absorbed = torch.einsum("bshn,hnl->bshl", q[..., :nope], w_uk)
    latent = F.rms_norm(kv[..., :rank], latent_norm.shape, latent_norm, eps)
    query = torch.cat([absorbed, q_rope], dim=-1)
    return query, torch.cat([latent, _rotate(kv[..., rank:], cos, sin, 1)], dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return rotary_embedding(x.float(), cos, sin, interleaved=True, num_heads=heads).to(x.dtype)


def _fake(q: Tensor, kv: Tensor, cos: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    w_uk, (batch, seq) = more[2], cos.shape[:2]
    return q.new_empty((batch, seq, w_uk.shape[0], kv.shape[1])), q.new_empty((batch, seq, kv.shape[1]))


def _no_body(attributes: Mapping[str, Any]) -> str:
    raise NotImplementedError("MlaQuery is made while an engine is built, where its plugin is: no graph holds it")


MLA_QUERY = OpSpec(
    name="MlaQuery",
    doc="Absorbs W_UK into decode's queries, normalises its latents and rotates both.",
    inputs=(
        TensorArg("q", "T", ("T", "H*N+H*R"), "projected queries, T = B * S"),
        TensorArg("kv", "T", ("T", "D"), "projected latents, then keys' rope parts"),
        TensorArg("cos", "float32", ("B", "S", "RHALF"), "of each token's angles"),
        TensorArg("sin", "float32", ("B", "S", "RHALF"), "of each token's angles"),
        TensorArg("latent_norm", "T", ("L",), "weight of the latents' RMS norm"),
        TensorArg("w_uk", "T", ("H", "N", "L"), "from latents to the keys' part without rope"),
    ),
    outputs=(
        TensorArg("query", "T", ("B", "S", "H", "D"), "absorbed queries, then their rotated rope parts"),
        TensorArg("latent", "T", ("B", "S", "D"), "normalised latents, then their rotated rope parts"),
    ),
    attributes=(Attribute("eps", "float", "of the norm"),),
    reference=mla_query,
    fake=_fake,
    body=_no_body,
    limits="stands in engines only",
)
