"""MlaPrefillNarrow: MlaPrefill over a cache of codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops import paging
from deepseek_trt.export.ops.cache import codes
from deepseek_trt.export.ops.mla_prefill import MLA_PREFILL, attend, attend_body
from deepseek_trt.export.ops.spec import OpSpec


def mla_prefill_narrow(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    past_rope: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    format: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As mla_prefill; new tokens are seen as they were narrowed."""
    pools, places = (past_latent, past_rope), (page_table, past_lengths, sequence_lengths)
    latents, present = codes.write_and_read(latent, pools, *places, format, group)
    return attend(query, latents, past_lengths, w_uk, w_uv, scale), *present


def _fake(
    query: Tensor, latent: Tensor, past_latent: Tensor, past_rope: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, sequence, heads, _ = query.shape
    *_, w_uv, _, _, _ = others
    attended = query.new_empty(batch, sequence, heads * w_uv.shape[1])
    return attended, torch.empty_like(past_latent), torch.empty_like(past_rope)


def _body(attributes: Mapping[str, Any]) -> str:
    kind = attributes["format"], attributes["group"]
    return f"""
    {paging.CONSTANTS_BODY}
    new = Cast <to = 7> (sequence_lengths)
    {codes.write_body(*kind)}
    {codes.read_body(*kind)}
    {attend_body(attributes)}
"""


MLA_PREFILL_NARROW = OpSpec(
    name="MlaPrefillNarrow",
    doc="Writes the new tokens' latents, as codes and scales, into the paged cache and attends causally, expanded.",
    inputs=(*MLA_PREFILL.inputs[:2], *codes.POOLS_IN, *MLA_PREFILL.inputs[3:]),
    outputs=(MLA_PREFILL.outputs[0], *codes.POOLS_OUT),
    attributes=(*MLA_PREFILL.attributes, *codes.ATTRIBUTES),
    reference=mla_prefill_narrow,
    fake=_fake,
    body=_body,
    limits=codes.LIMITS,
)
