"""MlaDecodeNarrow: MlaDecode over a cache of codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops import paging
from deepseek_trt.export.ops.cache import codes
from deepseek_trt.export.ops.mla_decode import MLA_DECODE, attend, attend_body
from deepseek_trt.export.ops.spec import OpSpec


def mla_decode_narrow(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    past_rope: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    scale: float,
    kv_lora_rank: int,
    format: str,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As mla_decode; new tokens are seen as they were narrowed."""
    pools, places = (past_latent, past_rope), (page_table, past_lengths, sequence_lengths)
    latents, present = codes.write_and_read(latent, pools, *places, format, group)
    return attend(query, latents, past_lengths, scale, kv_lora_rank), *present


def _fake(
    query: Tensor, latent: Tensor, past_latent: Tensor, past_rope: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    attended = query.new_empty(*query.shape[:3], past_latent.shape[2])
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


MLA_DECODE_NARROW = OpSpec(
    name="MlaDecodeNarrow",
    doc="Writes a few new tokens' latents, as codes and scales, into the paged cache and attends causally, absorbed.",
    inputs=(*MLA_DECODE.inputs[:2], *codes.POOLS_IN, *MLA_DECODE.inputs[3:]),
    outputs=(MLA_DECODE.outputs[0], *codes.POOLS_OUT),
    attributes=(*MLA_DECODE.attributes, *codes.ATTRIBUTES),
    reference=mla_decode_narrow,
    fake=_fake,
    body=_body,
    limits=codes.LIMITS,
)
