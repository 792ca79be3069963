"""Cases of the ops over a narrow cache: what they write, by its bits, and attention over what these numbers are.

Codes and scales are made and read after docs/narrow.md, by code that was written for this check alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gpu_check import reference
from gpu_check.cases import PAGE, Place, error_of, pages_of
from gpu_check.models import Sizes
from gpu_check.narrow_reference import plain_numbers
from gpu_check.shipped import ShippedBinary

if TYPE_CHECKING:
    from torch import Tensor

Rows = Sequence[int]
# Plugins' names by op and format, spelled out here.
DECODE = {"MlaDecodeNarrowInt8": "int8", "MlaDecodeNarrowFp8": "fp8"}
PREFILL = {"MlaPrefillNarrowInt8": "int8", "MlaPrefillNarrowFp8": "fp8"}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True)
class Narrow:
    """A cache's format, and the numbers of a latent that share a scale."""

    format: str
    group: int


def cases(
    ops: Any,
    place: Place,
    sizes: Sizes,
    binaries: Sequence[ShippedBinary],
    decodes: Sequence[tuple[Rows, int]],
    prefills: Sequence[tuple[Rows, Rows]],
) -> Iterator[tuple[str, Callable[[], Iterator[float]]]]:
    """Each op over a narrow cache that is among `binaries`, with its cases: cached tokens, and new ones."""
    groups = {b.op: b.constants["GROUP"] for b in binaries if b.kernel == "latent_narrow"}
    for op in sorted(groups.keys() & DECODE.keys()):
        cache = Narrow(DECODE[op], groups[op])
        yield op, functools.partial(_each, functools.partial(decode, ops, place, sizes, cache), decodes)
    for op in sorted(groups.keys() & PREFILL.keys()):
        cache = Narrow(PREFILL[op], groups[op])
        yield op, functools.partial(_each, functools.partial(prefill, ops, place, sizes, cache), prefills)


def _each(case: Callable[..., float], given: Sequence[tuple[Any, Any]]) -> Iterator[float]:
    yield from (case(*one) for one in given)


def narrowed(latents: Tensor, rank: int, cache: Narrow) -> tuple[Tensor, Tensor]:
    """Rows of both pools for latents [.., D]: codes [.., L] as bytes, and rope parts and scales [.., R + L / group]."""
    grouped = latents[..., :rank].float().unflatten(-1, (-1, cache.group))
    scales = (grouped.abs().amax(-1) / _LARGEST[cache.format]).to(latents.dtype)
    steps = scales.float()
    ratios = grouped / torch.where(steps == 0, torch.ones_like(steps), steps)[..., None]
    ratios = ratios.flatten(-2).clamp(-_LARGEST[cache.format], _LARGEST[cache.format])
    codes = _nearest_fp8(ratios) if cache.format == "fp8" else ratios.round().int() % 256
    return codes.to(torch.uint8), torch.cat([latents[..., rank:], scales], -1)


def _nearest_fp8(ratios: Tensor) -> Tensor:
    """The codes, 0 to 255, of the nearest numbers; of two that are as near the even one."""
    sizes = plain_numbers("fp8", torch.arange(127, dtype=torch.uint8, device=ratios.device))  # of codes in order
    middles, size = (sizes[1:] + sizes[:-1]) / 2, ratios.abs().double()
    code = torch.bucketize(size, middles)  # on a middle, the smaller one
    between = (code < 126) & (size == middles[code.clamp(max=125)]) & (code % 2 == 1)
    return code + between.int() + 128 * ratios.signbit().int()


def widened(pools: tuple[Tensor, Tensor], cache: Narrow, dtype: torch.dtype) -> Tensor:
    """The latents [.., D] of rows of both pools, rounded to the dtype once."""
    codes, rest = pools
    groups = codes.shape[-1] // cache.group
    numbers = plain_numbers(cache.format, codes).unflatten(-1, (groups, cache.group))
    latents = (numbers * rest[..., -groups:].double()[..., None]).flatten(-2).float().to(dtype)
    return torch.cat([latents, rest[..., :-groups]], -1)


@dataclass(frozen=True)
class _Pools:
    """Both pools before and after the new tokens, and the page table."""

    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]
    table: Tensor


def _pools(place: Place, sizes: Sizes, cache: Narrow, past: Rows, latent: Tensor, new: Rows, most: int) -> _Pools:
    """Cached tokens of random numbers; NaN and codes of 127 where there is none."""
    pages = pages_of(place, past, most, sizes.width)
    codes, rest = narrowed(pages.pool, sizes.rank, cache)
    empty = rest[..., -1:].isnan()
    codes = torch.where(empty, torch.full_like(codes, 127), codes)
    before = codes, torch.where(empty, torch.full_like(rest, torch.nan), rest)
    after = codes.clone(), before[1].clone()
    rows = narrowed(latent, sizes.rank, cache)
    for row, (start, count) in enumerate(zip(past, new, strict=True)):
        for step in range(count):
            at = pages.table[row, (start + step) // PAGE].long(), (start + step) % PAGE
            for pool, part in zip(after, rows, strict=True):
                pool[at] = part[row, step]
    return _Pools(before, after, pages.table)


def _written(present: Sequence[Tensor], pools: _Pools) -> float:
    """0 where both pools are what they were with the new tokens in their places, bit for bit; else infinite."""
    codes, rest = present
    same = torch.equal(codes.view(torch.uint8)[1:], pools.after[0][1:])
    same &= torch.equal(rest[1:].nan_to_num(9.0), pools.after[1][1:].nan_to_num(9.0))
    return 0.0 if same else float("inf")


def _keys(pools: _Pools, cache: Narrow, row: int, tokens: int) -> Tensor:
    """What the last of a row's tokens may see, [tokens, D] in float64."""
    rows = tuple(reference.cached_rows(pool, pools.table, row, tokens) for pool in pools.after)
    return widened((rows[0], rows[1]), cache, rows[1].dtype).double()


def decode(ops: Any, place: Place, sizes: Sizes, cache: Narrow, past: Rows, new: int) -> float:
    """As cases.decode."""
    count = [1 + row * 3 % new for row in range(len(past))]
    query = place.random(len(past), new, sizes.heads, sizes.width)
    latent = place.random(len(past), new, sizes.width)
    pools = _pools(place, sizes, cache, past, latent, count, max(past) + new)
    scale = (sizes.nope + sizes.rope) ** -0.5
    given = (query, latent, pools.before[0].view(torch.int8), pools.before[1], pools.table)
    lengths = place.ints(past), place.ints(count)
    attended, *present = ops["MlaDecodeNarrow"](*given, *lengths, scale, sizes.rank, cache.format, cache.group)
    worst = _written(present, pools)
    for row, own in enumerate(count):
        expected = reference.decode_row(query[row, :own], _keys(pools, cache, row, past[row] + own), scale, sizes.rank)
        worst = max(worst, error_of(attended[row, :own], expected, place.dtype))
    return worst


def prefill(ops: Any, place: Place, sizes: Sizes, cache: Narrow, past: Rows, count: Rows) -> float:
    """As cases.prefill."""
    steps = max(count) + 3
    query = place.random(len(past), steps, sizes.heads, sizes.nope + sizes.rope)
    latent = place.random(len(past), steps, sizes.width)
    most = max(p + n for p, n in zip(past, count, strict=True)) + 3
    pools = _pools(place, sizes, cache, past, latent, count, most)
    w_uk = place.random(sizes.heads, sizes.nope, sizes.rank, scale=sizes.rank**-0.5)
    w_uv = place.random(sizes.heads, sizes.value, sizes.rank, scale=sizes.rank**-0.5)
    scale = (sizes.nope + sizes.rope) ** -0.5
    given = (query, latent, pools.before[0].view(torch.int8), pools.before[1], pools.table)
    rest = place.ints(past), place.ints(count), w_uk, w_uv, scale
    attended, *present = ops["MlaPrefillNarrow"](*given, *rest, cache.format, cache.group)
    attended = attended.unflatten(-1, (sizes.heads, sizes.value))
    worst = _written(present, pools)
    for row, own in enumerate(count):
        keys = _keys(pools, cache, row, past[row] + own)
        expected = reference.prefill_row(query[row, :own], keys, w_uk, w_uv, scale)
        worst = max(worst, error_of(attended[row, :own], expected, place.dtype))
    return worst
