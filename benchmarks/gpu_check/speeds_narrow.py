"""Speeds of the products with narrow weights, against the copy by the bytes of codes and scales."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gpu_check import cases, narrow_cases
from gpu_check.items import Gpu, Item, NotRunError
from gpu_check.launching import Launch
from gpu_check.models import Sizes
from gpu_check.narrow_reference import GROUPS
from gpu_check.shipped import ShippedLibrary
from gpu_check.speeds import Named, Points, Work, _ops, _rows, recorded
from gpu_check.timing import Ceilings, Timer, copies_for

if TYPE_CHECKING:
    from torch import Tensor

LINEAR_TOKENS = (1, 16, 128)
EXPERTS_TOKENS = (1, 8, 32, 128)
_GEMMS = ("moe_gate_up_narrow", "moe_down_narrow")


def items(
    name: str,
    library: ShippedLibrary,
    points: Points,
    few: bool,
    measured: Callable[[], Ceilings],
    timer: Timer,
    gpu: Gpu,
) -> list[Item]:
    """One an op over narrow weights that the library has; `few`: with one count of tokens."""
    shipped, made = {b.op for b in library.binaries}, []
    for ops, works, tokens in (
        (narrow_cases.LINEAR, linear_works, LINEAR_TOKENS),
        (narrow_cases.EXPERTS, experts_works, EXPERTS_TOKENS),
    ):
        for op in sorted(shipped & set(ops)):
            own = functools.partial(works, ops[op], tokens[:1] if few else tokens)
            run = functools.partial(_rows, name, library, own, points, measured, timer, gpu)
            made.append(Item(f"{name} {op}", run))
    return made


def linear_works(
    format: str,
    counts: tuple[int, ...],
    place: cases.Place,
    sizes: Sizes,
    points: Points,
    journal: list[Launch],
    gpu: Gpu,
) -> Named:
    """A matrix as wide as a layer's shared experts, or attention's output; the sum of split sums is timed with it."""
    rows, columns = (sizes.shared * sizes.inter or sizes.heads * sizes.value), sizes.hidden

    def make(tokens: int) -> Work:
        operands = narrow_cases.weight(place, format, rows, columns)
        nbytes = _bytes_of(operands)
        copies = copies_for(nbytes, gpu.cache_bytes(), gpu.free_bytes() / 4)
        weights = [operands, *(tuple(part.clone() for part in operands) for _ in range(copies - 1))]
        x = place.random(tokens, columns)
        calls = [
            recorded(journal, functools.partial(_ops()["LinearNarrow"], x, *own, format, GROUPS[format]))
            for own in weights
        ]
        moved = nbytes + tokens * (rows + columns) * place.dtype.itemsize
        return Work(moved, 2.0 * tokens * rows * columns, calls)

    for tokens in counts:
        yield f"linear {format} {rows} x {columns}, {tokens} tokens", functools.partial(make, tokens)


def experts_works(
    format: str,
    counts: tuple[int, ...],
    place: cases.Place,
    sizes: Sizes,
    points: Points,
    journal: list[Launch],
    gpu: Gpu,
) -> Named:
    """Both grouped products, with SiLU between."""
    needed = 1.2 * narrow_cases.stacks_bytes(sizes) + 2**30
    made: list[tuple[Tensor, ...]] = []

    def make(tokens: int) -> Work:
        if not made:
            if gpu.free_bytes() < needed:
                raise NotRunError(f"{needed / 1e9:.1f} GB do not fit")
            made.append(narrow_cases.expert_stacks(place, sizes, format))
        of_one = _bytes_of(made[0]) / sizes.experts
        copies = copies_for(min(sizes.experts, tokens * sizes.top_k) * of_one, gpu.cache_bytes(), gpu.free_bytes() / 4)
        ids = [
            torch.rand(tokens, sizes.experts).topk(sizes.top_k).indices.int().to(place.device) for _ in range(copies)
        ]
        calls = [_experts_call(place, sizes, format, own, made[0], journal) for own in ids]
        hit, slots = statistics.mean(len(own.unique()) for own in ids), tokens * sizes.top_k
        activations = tokens * sizes.hidden + slots * (2 * sizes.inter + sizes.hidden)
        flops = 6.0 * slots * sizes.hidden * sizes.inter
        return Work(hit * of_one + activations * place.dtype.itemsize, flops, calls)

    for tokens in counts:
        yield f"grouped GEMM {format}, {tokens} tokens", functools.partial(make, tokens)


def _experts_call(
    place: cases.Place, sizes: Sizes, format: str, ids: Tensor, stacks: tuple[Tensor, ...], journal: list[Launch]
) -> list[Launch]:
    hidden, weights = place.random(len(ids), sizes.hidden), torch.rand(ids.shape, device=place.device)
    given = (hidden, weights, ids, *stacks, "silu", format, GROUPS[format])
    return recorded(journal, functools.partial(_ops()["MoeExpertsNarrow"], *given), _GEMMS)


def _bytes_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
