"""The model as transformers runs it: a mask over slots, given positions, and a cache that grows by concatenation.

The cache holds what transformers' own does: a layer's latents [B, 1, T, L] as key and rotated rope parts [B, 1, T, R]
as value, rotated in adjacent pairs. Attention is absorbed for prompts and single tokens alike, in plain operators: no
plugin reads such a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_trt.export.model import Attention, Backbone


def run_masked(
    backbone: Backbone, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The last layer's output [B, S, hidden], before the norm, and the cache with the new slots.

    tokens [B, S] are the last of attention_mask's [B, T] slots; `past` is key and value of each layer, or nothing.
    """
    batch, seq = tokens.shape[:2]
    slots = past[0].shape[2] if past else 0
    cos, sin = backbone.rope(position_ids, position_ids.amax(1, keepdim=True) + 1)
    sees = visible(attention_mask, slots, seq)
    pairs = [past[2 * index : 2 * index + 2] for index in range(len(backbone.layers))]
    x, present = backbone.through(tokens, pairs, lambda attention, x, pair: attend(attention, x, cos, sin, pair, sees))
    return x.view(batch, seq, -1), [part for pair in present for part in pair]


def visible(attention_mask: Tensor, past: int, seq: int) -> Tensor:
    """[B, S, T]: whether a new slot sees another: a real one before it, or itself, so that padding stays finite."""
    new = torch.arange(seq, device=attention_mask.device)[:, None] + past  # [S, 1]
    old = torch.arange(past + seq, device=attention_mask.device)  # [T]
    real = attention_mask.index_select(1, old) != 0
    return (real[:, None, :] & (old <= new)) | (old == new)


def attend(
    attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, past: Sequence[Tensor], sees: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Absorbed attention of x [T, hidden] over `past` and itself; also key and value with the new slots."""
    a = attention
    batch, seq = cos.shape[:2]
    q_nope, q_rope, latent = a.project(x, cos, sin)
    new = [part.unsqueeze(1) for part in (latent[..., : a.rank], latent[..., a.rank :])]
    key, value = [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)] if past else new
    absorbed = q_nope.transpose(1, 2) @ a.w_uk  # [B, H, S, L]
    folded = absorbed.flatten(1, 2), q_rope.transpose(1, 2).flatten(1, 2)  # [B, H * S, .]: one product for all heads
    scores = folded[0] @ key.squeeze(1).transpose(1, 2) + folded[1] @ value.squeeze(1).transpose(1, 2)
    scores = scores.float().view(batch, a.heads, seq, -1) * a.scale  # [B, H, S, T]
    weights = scores.masked_fill(~sees[:, None], -3.0e38).softmax(-1).to(x.dtype)
    attended = weights.flatten(1, 2) @ key.squeeze(1)  # [B, H * S, L]
    heads = attended.view(batch, a.heads, seq, -1) @ a.w_uv.transpose(1, 2)  # [B, H, S, V]
    return a.o_proj(heads.transpose(1, 2).flatten(2).flatten(0, 1)), [key, value]


def positions_of(attention_mask: Tensor) -> Tensor:
    """position_ids [B, S] that count each row's real tokens, whichever side is padded."""
    return ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)
