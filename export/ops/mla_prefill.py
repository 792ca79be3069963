"""MlaPrefill: many new tokens a sequence attend to the paged latent cache and to each other, expanded.

Keys and values are expanded from the latents (k_nope = c W_UK^T, v = c W_UV^T, one rotated rope part for all heads):
for many queries that is cheaper than the absorbed form, whose heads are 576 and 512 wide instead of 192 and 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops import paging
from deepseek_trt.export.ops.spec import Attribute, OpSpec, TensorArg


def mla_prefill(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Write the latents, expand the cache, and attend causally: query s of row b sees positions 0..past_lengths[b]+s.

    Rows of `attended` at s >= sequence_lengths[b] are finite but mean nothing.
    """
    present = paging.write_latents(past_latent, latent, page_table, past_lengths, sequence_lengths)
    latents = paging.read_latents(present, page_table, past_lengths + sequence_lengths)  # [B, T, D]
    return attend(query, latents, past_lengths, w_uk, w_uv, scale), present


def attend(query: Tensor, latents: Tensor, past_lengths: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """The sums [B, S, H * V] of the values that each query sees, expanded from latents [B, T, D]."""
    nope, rank = w_uk.shape[1:]
    c, k_rope = latents[:, None, :, :rank], latents[:, None, :, rank:]  # [B, 1, T, L], [B, 1, T, R]
    k_nope, value = c @ w_uk.transpose(1, 2), c @ w_uv.transpose(1, 2)  # [B, H, T, N], [B, H, T, V]
    q_nope, q_rope = query.transpose(1, 2).split([nope, query.shape[-1] - nope], dim=-1)  # [B, H, S, .]
    scores = (q_nope @ k_nope.transpose(2, 3) + q_rope @ k_rope.transpose(2, 3)).float() * scale  # [B, H, S, T]
    steps = torch.arange(query.shape[1], device=query.device)
    positions = past_lengths.long()[:, None] + steps  # [B, S]
    future = torch.arange(latents.shape[1], device=query.device) > positions[:, :, None]  # [B, S, T]
    weights = scores.masked_fill(future[:, None], -torch.inf).softmax(-1)
    attended = weights.to(query.dtype) @ value  # [B, H, S, V]
    return attended.transpose(1, 2).flatten(2)


def _fake(query: Tensor, latent: Tensor, past_latent: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, sequence, heads, _ = query.shape
    *_, w_uv, _ = others
    return query.new_empty(batch, sequence, heads * w_uv.shape[1]), torch.empty_like(past_latent)


def _body(attributes: Mapping[str, Any]) -> str:
    return f"""
    {paging.CONSTANTS_BODY}
    new = Cast <to = 7> (sequence_lengths)
    {paging.WRITE_BODY}
    {paging.READ_BODY}
    {attend_body(attributes)}
"""


def attend_body(attributes: Mapping[str, Any]) -> str:
    """From query, w_uk, w_uv and what READ_BODY gives to attended."""
    return f"""
    rank = Shape <start = 2> (w_uk)
    nope = Shape <start = 1, end = 2> (w_uk)
    latents_4d = Unsqueeze (latents, axis_1)
    to_the_end = Constant <value_ints = [2147483647]> ()
    c = Slice (latents_4d, axis_0, rank, last_axis)
    k_rope = Slice (latents_4d, rank, to_the_end, last_axis)
    w_uk_t = Transpose <perm = [0, 2, 1]> (w_uk)
    w_uv_t = Transpose <perm = [0, 2, 1]> (w_uv)
    k_nope = MatMul (c, w_uk_t)
    value = MatMul (c, w_uv_t)
    heads_first = Transpose <perm = [0, 2, 1, 3]> (query)
    q_nope = Slice (heads_first, axis_0, nope, last_axis)
    q_rope = Slice (heads_first, nope, to_the_end, last_axis)
    k_nope_t = Transpose <perm = [0, 1, 3, 2]> (k_nope)
    k_rope_t = Transpose <perm = [0, 1, 3, 2]> (k_rope)
    products_nope = MatMul (q_nope, k_nope_t)
    products_rope = MatMul (q_rope, k_rope_t)
    products = Add (products_nope, products_rope)
    products_f = Cast <to = 1> (products)
    scale_f = Constant <value_float = {float(attributes["scale"])!r}> ()
    scores = Mul (products_f, scale_f)
    positions_column = Unsqueeze (positions, last_axis)
    is_past = LessOrEqual (times, positions_column)
    is_past_4d = Unsqueeze (is_past, axis_1)
    scores_past = Where (is_past_4d, scores, lowest)
    weights_f = Softmax <axis = -1> (scores_past)
    weights = CastLike (weights_f, query)
    attended_heads = MatMul (weights, value)
    attended_4d = Transpose <perm = [0, 2, 1, 3]> (attended_heads)
    merge_heads = Constant <value_ints = [0, 0, -1]> ()
    attended = Reshape (attended_4d, merge_heads)
"""


MLA_PREFILL = OpSpec(
    name="MlaPrefill",
    doc="Writes the new tokens' latents into the paged cache and attends causally to all cached tokens, expanded.",
    inputs=(
        TensorArg("query", "T", ("B", "S", "H", "N+R"), "queries, rope part rotated; right-padded"),
        TensorArg("latent", "T", ("B", "S", "D"), "the new tokens' normalised latents, then their rotated rope parts"),
        TensorArg("past_latent", "T", ("P", "page", "D"), "the page pool"),
        TensorArg("page_table", "int32", ("B", "M"), "pages of each sequence, in order"),
        TensorArg("past_lengths", "int32", ("B",), "tokens of each sequence already cached"),
        TensorArg("sequence_lengths", "int32", ("B",), "real tokens among the S of each sequence"),
        TensorArg("w_uk", "T", ("H", "N", "L"), "from latents to the keys' part without rope"),
        TensorArg("w_uv", "T", ("H", "V", "L"), "from latents to values"),
    ),
    outputs=(
        TensorArg("attended", "T", ("B", "S", "H*V"), "attended values, heads side by side"),
        TensorArg("present_latent", "T", ("P", "page", "D"), "the pool with the new tokens; may be past_latent itself"),
    ),
    attributes=(Attribute("scale", "float", "factor on the scores, YaRN's amplitude included"),),
    reference=mla_prefill,
    fake=_fake,
    body=_body,
)
