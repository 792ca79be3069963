"""MlaDecode: one new token a sequence attends to the paged latent cache, absorbed.

The query arrives already multiplied by W_UK, and the output leaves before W_UV (DeepSeek-V2, arXiv:2405.04434, section
2.1.2): both are plain batched MatMuls outside. What is left is multi-query attention whose one key is the cached row
itself (kv_lora_rank latents, then the rotated rope part) and whose value is that row's latent part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops import paging
from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def mla_decode(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    """Write `latent` at position past_lengths[b] of each row, then attend to positions 0..past_lengths[b]."""
    ones = torch.ones_like(past_lengths)
    present = paging.write_latents(past_latent, latent, page_table, past_lengths, ones)
    latents = paging.read_latents(present, page_table, past_lengths + ones)  # [B, T, D]
    scores = (query @ latents.transpose(1, 2)).float() * scale  # [B, H, T]
    times = torch.arange(latents.shape[1], device=query.device)
    future = times > past_lengths.long()[:, None]  # [B, T]
    weights = scores.masked_fill(future[:, None, :], -torch.inf).softmax(-1)
    attended = weights.to(query.dtype) @ latents[..., :kv_lora_rank]  # [B, H, L]
    return attended, present


def _fake(query: Tensor, latent: Tensor, past_latent: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, _ = query.shape
    *_, kv_lora_rank = others
    return query.new_empty(batch, heads, kv_lora_rank), torch.empty_like(past_latent)


def _body(attributes: Mapping[str, Any]) -> str:
    return f"""
    {paging.CONSTANTS_BODY}
    {paging.WRITE_BODY.format(real_page=paging.NO_PADDING)}
    new = Identity (axis_1)
    {paging.READ_BODY}
    keys = Transpose <perm = [0, 2, 1]> (latents)
    products = MatMul (query, keys)
    products_f = Cast <to = 1> (products)
    scale_f = Constant <value_float = {float(attributes["scale"])!r}> ()
    scores = Mul (products_f, scale_f)
    is_cached_column = Unsqueeze (is_cached, axis_1)
    scores_past = Where (is_cached_column, scores, lowest)
    weights_f = Softmax <axis = -1> (scores_past)
    weights = CastLike (weights_f, query)
    attended_rows = MatMul (weights, latents)
    rank = Constant <value_ints = [{attributes["kv_lora_rank"]}]> ()
    attended = Slice (attended_rows, axis_0, rank, last_axis)
"""


MLA_DECODE = OpSpec(
    name="MlaDecode",
    doc="Writes one token's latent into the paged cache and attends to the cache, absorbed.",
    inputs=(
        TensorArg("query", "T", ("B", "H", "D"), "absorbed query: q_nope @ W_UK, then the rotated rope part"),
        TensorArg("latent", "T", ("B", "1", "D"), "the new token's normalised latent, then its rotated rope part"),
        TensorArg("past_latent", "T", ("P", "page", "D"), "the page pool"),
        TensorArg("page_table", "int32", ("B", "M"), "pages of each sequence, in order"),
        TensorArg("past_lengths", "int32", ("B",), "tokens of each sequence already cached"),
    ),
    outputs=(
        TensorArg("attended", "T", ("B", "H", "L"), "attended latents, before W_UV"),
        TensorArg("present_latent", "T", ("P", "page", "D"), "the pool with the new token; may be past_latent itself"),
    ),
    attributes=(
        Attribute("scale", "float", "factor on the scores, YaRN's amplitude included"),
        Attribute("kv_lora_rank", "int", "L, the width of the latent part of D"),
    ),
    reference=mla_decode,
    fake=_fake,
    body=_body,
)
