"""Cases: inputs of each op at a model's sizes, what runs on them, and how far the result is from the reference.

What is not cached is NaN, so that a stray read is loud; page 0 is scratch. Errors are given as shares of what is
tolerated, so 1 is the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gpu_check import reference
from gpu_check.models import Sizes

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 64
# Of the result as a whole, in ulps of its dtype. In 16 bits weights, intermediates and output are rounded about once
# each (half an ulp); float32's figure is the accumulation of some thousand products.
RMS_ULPS = {torch.float32: 64.0, torch.float16: 1.5, torch.bfloat16: 1.5}
# Of the worst element, against the largest of the result: what a missed tile or a stray page would exceed by far.
MAX_ULPS = {torch.float32: 512.0, torch.float16: 8.0, torch.bfloat16: 8.0}
# Of a router's weights: an exponential, a sum, a division and a product, a rounding or two each.
ROUTER = 2e-6


@dataclass(frozen=True)
class Place:
    """Where tensors are made: cuda, or cpu under the interpreter."""

    device: str
    dtype: torch.dtype

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype or self.dtype)

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


def error_of(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The larger of both errors as a share of what is tolerated; infinite where a number is not finite."""
    if not bool(actual.isfinite().all()):
        return float("inf")
    error, eps = (actual.double() - expected).abs(), torch.finfo(dtype).eps
    whole = float(error.norm() / (RMS_ULPS[dtype] * eps * expected.norm()))
    return max(whole, float(error.max() / (MAX_ULPS[dtype] * eps * expected.abs().max())))


@dataclass(frozen=True)
class Pages:
    """A paged cache: pool [P, PAGE, D], table [B, M], both with more than the rows use."""

    pool: Tensor
    table: Tensor


def pages_of(place: Place, cached: Sequence[int], capacity: int, width: int) -> Pages:
    """Random rows, NaN where nothing is cached, pages in random order."""
    entries = -(-capacity // PAGE)
    count = len(cached) * entries
    table = (torch.randperm(count, device=place.device) + 1).view(len(cached), entries).int()
    pool = place.random(count + 1, PAGE, width)
    slots = torch.arange(entries * PAGE, device=place.device).view(entries, PAGE)
    for row, length in enumerate(cached):
        pages = table[row].long()
        pool[pages] = torch.where((slots < length)[..., None], pool[pages], torch.nan)
    pool[0] = torch.nan
    return Pages(pool, table)


def _written(present: Tensor, pages: Pages, latent: Tensor, past: Sequence[int], count: Sequence[int]) -> float:
    """0 where the pool is what it was with the new latents in their places, bit for bit; else infinite."""
    expected = pages.pool.clone()
    for row, (start, new) in enumerate(zip(past, count, strict=True)):
        for step in range(new):
            at = start + step
            expected[pages.table[row, at // PAGE].long(), at % PAGE] = latent[row, step]
    same = torch.equal(present[1:].float().nan_to_num(9.0), expected[1:].float().nan_to_num(9.0))
    return 0.0 if same else float("inf")


def decode(ops: Any, place: Place, sizes: Sizes, past: Sequence[int], new: int) -> float:
    """Rows with `past` cached tokens and up to `new` new ones."""
    pages = pages_of(place, past, max(past) + new, sizes.width)
    query = place.random(len(past), new, sizes.heads, sizes.width)
    latent = place.random(len(past), new, sizes.width)
    count = [1 + row * 3 % new for row in range(len(past))]
    scale = (sizes.nope + sizes.rope) ** -0.5
    given = (query, latent, pages.pool, pages.table, place.ints(past), place.ints(count))
    attended, present = ops["MlaDecode"](*given, scale, sizes.rank)
    worst = _written(present, pages, latent, past, count)
    for row, own in enumerate(count):
        keys = reference.keys_of(pages.pool, pages.table, latent, list(past), count, row)
        expected = reference.decode_row(query[row, :own], keys, scale, sizes.rank)
        worst = max(worst, error_of(attended[row, :own], expected, place.dtype))
    return worst


def prefill(ops: Any, place: Place, sizes: Sizes, past: Sequence[int], count: Sequence[int]) -> float:
    """Rows with `past` cached tokens and `count` new ones, padded by three."""
    steps = max(count) + 3
    most = max(p + n for p, n in zip(past, count, strict=True)) + 3
    pages = pages_of(place, past, most, sizes.width)
    query = place.random(len(past), steps, sizes.heads, sizes.nope + sizes.rope)
    latent = place.random(len(past), steps, sizes.width)
    w_uk = place.random(sizes.heads, sizes.nope, sizes.rank, scale=sizes.rank**-0.5)
    w_uv = place.random(sizes.heads, sizes.value, sizes.rank, scale=sizes.rank**-0.5)
    scale = (sizes.nope + sizes.rope) ** -0.5
    given = (query, latent, pages.pool, pages.table, place.ints(past), place.ints(count), w_uk, w_uv)
    attended, present = ops["MlaPrefill"](*given, scale)
    attended = attended.unflatten(-1, (sizes.heads, sizes.value))
    worst = _written(present, pages, latent, past, count)
    for row, own in enumerate(count):
        keys = reference.keys_of(pages.pool, pages.table, latent, list(past), list(count), row)
        expected = reference.prefill_row(query[row, :own], keys, w_uk, w_uv, scale)
        worst = max(worst, error_of(attended[row, :own], expected, place.dtype))
    return worst


def router(ops: Any, place: Place, sizes: Sizes, tokens: int) -> float:
    """Softmax scores and the best group by its best expert (V2), or biased sigmoids and best two (V3)."""
    logits = place.random(tokens, sizes.experts, dtype=torch.float32)
    rest = (sizes.top_k, sizes.groups, sizes.topk_groups, int(sizes.normalise), sizes.scale)
    bias = place.random(sizes.experts, scale=0.1, dtype=torch.float32)
    if sizes.biased:
        weights, ids = ops["MoeBiasedRouter"](logits, bias, *rest)
    else:
        weights, ids = ops["MoeRouter"](logits, *rest)
    scores, choice, groups = reference.scores_of(logits, bias, sizes.groups, sizes.biased)
    best = reference.choose(choice, groups, sizes.topk_groups, sizes.top_k)
    normalise = sizes.normalise and sizes.top_k > 1
    factor = sizes.scale if sizes.biased or not normalise else 1.0
    return max(
        _router_error(choice.gather(1, ids.long()), choice.gather(1, best)),  # another id of an equal score is right
        _router_error(weights, _router_weights(scores.gather(1, ids.long()), normalise) * factor),
        0.0 if all(len(set(row)) == sizes.top_k for row in ids.tolist()) else float("inf"),
    )


def _router_weights(scores: Tensor, normalise: bool) -> Tensor:
    return scores / scores.sum(1, keepdim=True) if normalise else scores


def _router_error(actual: Tensor, expected: Tensor) -> float:
    if not bool(actual.isfinite().all()):
        return float("inf")
    return float(((actual.double() - expected).abs() / (ROUTER * expected.abs())).max())


def expert_stacks(place: Place, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up [E, inter, hidden], down [E, hidden, inter] of all experts, made one at a time."""
    shapes = ((sizes.inter, sizes.hidden), (sizes.inter, sizes.hidden), (sizes.hidden, sizes.inter))
    stacks = [torch.empty(sizes.experts, *shape, device=place.device, dtype=place.dtype) for shape in shapes]
    for stack, (_, columns) in zip(stacks, shapes, strict=True):
        for expert in stack:
            expert.normal_(std=columns**-0.5)
    return stacks[0], stacks[1], stacks[2]


def experts(ops: Any, place: Place, sizes: Sizes, tokens: int, stacks: tuple[Tensor, Tensor, Tensor]) -> float:
    """Routed experts of `tokens` tokens, weights as if chosen at random."""
    ids = torch.rand(tokens, sizes.experts, device=place.device).topk(sizes.top_k).indices.int()
    hidden = place.random(tokens, sizes.hidden)
    weights = torch.rand(tokens, sizes.top_k, device=place.device)
    actual = ops["MoeExperts"](hidden, weights, ids, *stacks, "silu")
    return error_of(actual, reference.expert_sum(hidden, weights, ids, *stacks), place.dtype)
