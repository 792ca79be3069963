"""MlaDecode: a few new tokens a sequence attend to the paged latent cache and to each other, absorbed.

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
    sequence_lengths: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    """Write the latents, then attend causally: query s of row b sees positions 0..past_lengths[b]+s.

    Rows of `attended` at s >= sequence_lengths[b] are finite but mean nothing.
    """
    present = paging.write_latents(past_latent, latent, page_table, past_lengths, sequence_lengths)
    latents = paging.read_latents(present, page_table, past_lengths + sequence_lengths)  # [B, T, D]
    return attend(query, latents, past_lengths, scale, kv_lora_rank), present


def attend(query: Tensor, latents: Tensor, past_lengths: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """The sums [B, S, H, L] of the latents [B, T, D] that each query sees."""
    steps = query.shape[1]
    scores = (query.flatten(1, 2) @ latents.transpose(1, 2)).float() * scale  # [B, S * H, T]
    positions = past_lengths.long()[:, None] + torch.arange(steps, device=query.device)  # [B, S]
    future = torch.arange(latents.shape[1], device=query.device) > positions[:, :, None]  # [B, S, T]
    hidden = future.repeat_interleave(query.shape[2], 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    attended = weights.to(query.dtype) @ latents[..., :kv_lora_rank]  # [B, S * H, L]
    return attended.unflatten(1, query.shape[1:3])


def _fake(query: Tensor, latent: Tensor, past_latent: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, kv_lora_rank = others
    return query.new_empty(*query.shape[:3], kv_lora_rank), torch.empty_like(past_latent)


def _body(attributes: Mapping[str, Any]) -> str:
    return f"""
    {paging.CONSTANTS_BODY}
    new = Cast <to = 7> (sequence_lengths)
    {paging.WRITE_BODY}
    {paging.READ_BODY}
    {attend_body(attributes)}
"""


def attend_body(attributes: Mapping[str, Any]) -> str:
    """From query and what READ_BODY gives to attended."""
    return f"""
    steps_and_heads = Shape <start = 1, end = 3> (query)
    rows_of_queries = Concat <axis = 0> (keep_batch, latent_dim)
    queries = Reshape (query, rows_of_queries)
    keys = Transpose <perm = [0, 2, 1]> (latents)
    products = MatMul (queries, keys)
    products_f = Cast <to = 1> (products)
    scale_f = Constant <value_float = {float(attributes["scale"])!r}> ()
    scores_of_rows = Mul (products_f, scale_f)
    batch_dim = Shape <end = 1> (query)
    by_head = Concat <axis = 0> (batch_dim, steps_and_heads, last_axis)
    scores = Reshape (scores_of_rows, by_head)
    positions_column = Unsqueeze (positions, last_axis)
    is_past = LessOrEqual (times, positions_column)
    axis_2 = Constant <value_ints = [2]> ()
    is_past_4d = Unsqueeze (is_past, axis_2)
    scores_past = Where (is_past_4d, scores, lowest)
    weights_f = Softmax <axis = -1> (scores_past)
    weights = CastLike (weights_f, query)
    rows_dim_4d = Concat <axis = 0> (keep_batch, rows_dim)
    weights_of_rows = Reshape (weights, rows_dim_4d)
    attended_rows = MatMul (weights_of_rows, latents)
    rank = Constant <value_ints = [{attributes["kv_lora_rank"]}]> ()
    attended_latents = Slice (attended_rows, axis_0, rank, last_axis)
    attended = Reshape (attended_latents, by_head)
"""


MLA_DECODE = OpSpec(
    name="MlaDecode",
    doc="Writes a few new tokens' latents into the paged cache and attends causally to the cache, absorbed.",
    inputs=(
        TensorArg("query", "T", ("B", "S", "H", "D"), "absorbed queries: q_nope @ W_UK, then the rotated rope part"),
        TensorArg("latent", "T", ("B", "S", "D"), "the new tokens' normalised latents, then their rotated rope parts"),
        TensorArg("past_latent", "T", ("P", "page", "D"), "the page pool"),
        TensorArg("page_table", "int32", ("B", "M"), "pages of each sequence, in order"),
        TensorArg("past_lengths", "int32", ("B",), "tokens of each sequence already cached"),
        TensorArg("sequence_lengths", "int32", ("B",), "real tokens among the S of each sequence, right-padded"),
    ),
    outputs=(
        TensorArg("attended", "T", ("B", "S", "H", "L"), "attended latents, before W_UV"),
        TensorArg("present_latent", "T", ("P", "page", "D"), "the pool with the new tokens; may be past_latent itself"),
    ),
    attributes=(
        Attribute("scale", "float", "factor on the scores, YaRN's amplitude included"),
        Attribute("kv_lora_rank", "int", "L, the width of the latent part of D"),
    ),
    reference=mla_decode,
    fake=_fake,
    body=_body,
)
