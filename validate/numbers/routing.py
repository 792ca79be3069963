"""Router choices: are two different ones a near tie, and the reference made to follow the other one.

A candidate that rounds differently may choose another expert where two score almost alike. Everything after that token
then differs, though nothing is wrong. Such a choice is a near tie when moving the reference's router logits by no more
than the rounding tolerance makes the reference choose alike; then the reference follows the candidate, and all else is
compared as strictly as ever. Any other difference is an error, and the reference keeps its own choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_trt.export.ops.moe_biased_router import moe_biased_router
from deepseek_trt.export.ops.moe_router import moe_router

_HALVINGS = 20


@dataclass(frozen=True)
class Flip:
    """One token's experts, chosen differently.

    `margin` is the least move of the router logits that explains it, relative to the largest of them; `allowed` is what
    rounding explains.
    """

    step: int
    layer: int
    token: int
    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    margin: float
    allowed: float

    @property
    def near_tie(self) -> bool:
        return self.margin <= self.allowed


@dataclass(frozen=True)
class Router:
    """A router as one layer has it: the op's attributes, and the V3 family's correction bias [E], else None."""

    attributes: tuple[Any, ...]  # top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor
    bias: Tensor | None = None

    @property
    def top_k(self) -> int:
        return int(self.attributes[0])

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K] of logits [T, E]."""
        if self.bias is None:
            return moe_router(logits, *self.attributes)
        return moe_biased_router(logits, self.bias, *self.attributes)

    def weights_of(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The weights [T, K] for given ids [T, K]: the op's arithmetic without its choice."""
        top_k, _, _, normalise, factor = self.attributes
        scores = logits.float().softmax(-1) if self.bias is None else logits.float().sigmoid()
        weights, normalised = scores.gather(1, ids.long()), normalise and top_k > 1
        if normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights if normalised and self.bias is None else weights * float(factor)


def differing_tokens(ours: Tensor, theirs: Tensor) -> list[int]:
    """Rows of two id tables [T, K] that name different sets of experts."""
    different = (ours.sort(-1).values != theirs.sort(-1).values).any(-1)
    return [int(token) for token in different.nonzero().flatten()]


def margin(logits: Tensor, ids: Tensor, router: Router) -> float:
    """The least d so that logits [E], moved by d up at `ids` [K] and down elsewhere, are routed to `ids`; else inf.

    Relative to the largest |logit|.
    """
    largest = float(logits.abs().max())
    toward = torch.full_like(logits, -1.0).scatter(0, ids.long(), 1.0)
    low, high = 0.0, 2.0 * largest
    if not _routed(logits + high * toward, ids, router):
        return float("inf")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _routed(logits + middle * toward, ids, router) else (middle, high)
    return high / largest


def closest_gap(logits: Tensor, router: Router) -> Tensor:
    """The gap [T] between the last chosen and the first refused, expert or group, of each token of logits [T, E].

    In router logits, relative to the token's largest: a gap closes when both sides move by half of it. Biased scores
    move by s * (1 - s), the sigmoid's slope, for each unit of their logit.
    """
    top_k, n_group, topk_group = (int(x) for x in router.attributes[:3])
    scores, slopes = logits.double(), torch.ones_like(logits, dtype=torch.float64)
    if router.bias is not None:
        s = scores.sigmoid()
        scores, slopes = s + router.bias, s * (1 - s)
    gaps = torch.full((len(logits),), torch.inf, dtype=torch.float64)
    if topk_group < n_group:
        count = 1 if router.bias is None else 2  # experts that a group's score is the sum of
        best, where = (x[..., :count] for x in _grouped(scores, n_group).sort(-1, descending=True))
        slope = _grouped(slopes, n_group).gather(-1, where).sum(-1)
        kept, gaps = _gap(best.sum(-1), slope, topk_group)
        grouped = _grouped(scores, n_group)
        scores = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    if top_k < logits.shape[-1]:
        gaps = torch.minimum(gaps, _gap(scores, slopes, top_k)[1])
    return gaps / logits.double().abs().amax(-1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.view(len(x), groups, -1)


def _gap(scores: Tensor, slopes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which [T, N] are the `count` best, and the gap [T] to the next in units of what moves both."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    last, first = order[:, count - 1, None], order[:, count, None]
    gap = scores.gather(1, last) - scores.gather(1, first)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :count], True)
    return kept, (2 * gap / (slopes.gather(1, last) + slopes.gather(1, first)))[:, 0]


def _routed(logits: Tensor, ids: Tensor, router: Router) -> bool:
    _, chosen = router.route(logits[None])
    return bool((chosen[0].sort().values == ids.sort().values).all())
