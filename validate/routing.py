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


def differing_tokens(ours: Tensor, theirs: Tensor) -> list[int]:
    """Rows of two id tables [T, K] that name different sets of experts."""
    different = (ours.sort(-1).values != theirs.sort(-1).values).any(-1)
    return [int(token) for token in different.nonzero().flatten()]


def margin(logits: Tensor, ids: Tensor, attributes: tuple[Any, ...]) -> float:
    """The least d so that logits [E], moved by d up at `ids` [K] and down elsewhere, are routed to `ids`; else inf.

    Relative to the largest |logit|.
    """
    largest = float(logits.abs().max())
    toward = torch.full_like(logits, -1.0).scatter(0, ids.long(), 1.0)
    low, high = 0.0, 2.0 * largest
    if not _routed(logits + high * toward, ids, attributes):
        return float("inf")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _routed(logits + middle * toward, ids, attributes) else (middle, high)
    return high / largest


def weights_of(logits: Tensor, ids: Tensor, attributes: tuple[Any, ...]) -> Tensor:
    """The router's weights [T, K] for given ids [T, K]: MoeRouter's arithmetic without its choice."""
    top_k, _, _, normalise, factor = attributes
    weights = logits.float().softmax(-1).gather(1, ids.long())
    if normalise and top_k > 1:
        return weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * float(factor)


def _routed(logits: Tensor, ids: Tensor, attributes: tuple[Any, ...]) -> bool:
    _, chosen = moe_router(logits[None], *attributes)
    return bool((chosen[0].sort().values == ids.sort().values).all())
