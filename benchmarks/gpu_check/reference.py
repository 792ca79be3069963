"""What the kernels are to give, computed plainly in float64 and written for this check alone.

The formulas are those of the papers: DeepSeek-V2 (arXiv:2405.04434, sections 2.1 and 2.2) and V3 (arXiv:2412.19437,
section 2.1.2). Sizes: B rows, S new tokens, H heads, L latents, R rope numbers, D = L + R, E experts, K a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cached_rows(pool: Tensor, table: Tensor, row: int, tokens: int) -> Tensor:
    """The first `tokens` cached latents of a row, [tokens, D]."""
    return pool[table[row].long()].flatten(0, 1)[:tokens]


def keys_of(pool: Tensor, table: Tensor, latent: Tensor, past: list[int], count: list[int], row: int) -> Tensor:
    """What a row's new tokens may see, the new ones last: [past + count, D] in float64."""
    import torch

    old = cached_rows(pool, table, row, past[row])
    return torch.cat((old, latent[row, : count[row]])).double()


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens: query [S, H, D], keys [T, H or 1, D], values [T, H or 1, V] -> [S, H, V]."""
    import torch

    steps, total = len(query), len(keys)
    query, keys, values = (t.double().transpose(0, 1) for t in (query, keys, values))  # [H, ...]
    scores = query @ keys.transpose(1, 2) * scale  # [H, S, T]
    last = torch.arange(total - steps, total, device=scores.device)
    hidden = torch.arange(total, device=scores.device)[None, :] > last[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1)


def decode_row(query: Tensor, keys: Tensor, scale: float, rank: int) -> Tensor:
    """Absorbed: one key row for all heads, whose latents are the value too. query [S, H, D] -> [S, H, L]."""
    shared = keys[:, None]
    return attend(query, shared, shared[..., :rank], scale)


def prefill_row(query: Tensor, keys: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """Expanded: query [S, H, N + R], w_uk [H, N, L], w_uv [H, V, L] -> [S, H, V]."""
    import torch

    heads, _, rank = w_uk.shape
    nope = torch.einsum("tl,hnl->thn", keys[:, :rank], w_uk.double())
    rope = keys[:, None, rank:].expand(-1, heads, -1)
    values = torch.einsum("tl,hvl->thv", keys[:, :rank], w_uv.double())
    return attend(query, torch.cat((nope, rope), -1), values, scale)


def choose(choice: Tensor, group_scores: Tensor, topk_groups: int, top_k: int) -> Tensor:
    """The ids [T, K] of the best in `choice` [T, E], of the best groups by group_scores [T, G] alone, best first."""
    return _of_best_groups(choice, group_scores, topk_groups).topk(top_k).indices


def margin(choice: Tensor, group_scores: Tensor, topk_groups: int, top_k: int) -> Tensor:
    """By how much the last that is chosen is better than the first that is not, of experts and of groups, [T]."""
    import torch

    gaps = []
    kept = _of_best_groups(choice, group_scores, topk_groups)
    for scores, count in (kept, top_k), (group_scores, topk_groups):
        if count < scores.shape[1]:
            best = scores.topk(count + 1).values
            gaps.append(best[:, -2] - best[:, -1])
    return torch.stack(gaps).amin(0) if gaps else torch.full((len(choice),), torch.inf, device=choice.device)


def _of_best_groups(choice: Tensor, group_scores: Tensor, topk_groups: int) -> Tensor:
    import torch

    groups = group_scores.shape[1]
    if topk_groups >= groups:
        return choice
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, group_scores.topk(topk_groups).indices, True)
    return choice.masked_fill(~kept.repeat_interleave(choice.shape[1] // groups, 1), -torch.inf)


def scores_of(logits: Tensor, bias: Tensor, groups: int, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, what is chosen by [T, E], and the groups' scores [T, G]: V2's softmax, V3's biased sigmoids."""
    logits = logits.double()
    scores = logits.sigmoid() if biased else logits.softmax(-1)
    choice = scores + bias.double() if biased else scores
    grouped = choice.unflatten(-1, (groups, -1))
    return scores, choice, grouped.topk(2).values.sum(-1) if biased else grouped.amax(-1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Adjacent pairs of x [..., R] turned by angles [..., R / 2]."""
    import torch

    x = x.double().unflatten(-1, (-1, 2))
    cos, sin = angles.double().cos(), angles.double().sin()
    return torch.stack((x[..., 0] * cos - x[..., 1] * sin, x[..., 0] * sin + x[..., 1] * cos), -1).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of x [..., L]: divided by its root mean square, times weight [L]."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def expert_sum(hidden: Tensor, weights: Tensor, ids: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs, [T, hidden], one expert at a time."""
    import torch

    total = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert in ids.unique().tolist():
        chosen = (ids == expert).any(1)
        share = (weights.double() * (ids == expert))[chosen].sum(1, keepdim=True)
        x = hidden[chosen].double()
        inner = torch.nn.functional.silu(x @ gate[expert].double().T) * (x @ up[expert].double().T)
        total[chosen] += share * (inner @ down[expert].double().T)
    return total
