"""Cases of the ops over narrow weights: every code by itself, products at a model's sizes, and its experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpu_check import reference
from gpu_check.cases import MAX_ULPS, RMS_ULPS, Place, error_of
from gpu_check.items import Gpu, NotRunError
from gpu_check.models import Sizes
from gpu_check.narrow_reference import FP8_NANS, GROUPS, ROWS, NarrowStack, numbers_of
from gpu_check.shipped import ShippedBinary, token_counts

if TYPE_CHECKING:
    from torch import Tensor

Cases = tuple[str, Callable[[], Iterator[float]]]
# Plugins' names by op and format, spelled out here.
LINEAR = {"LinearNarrowInt8": "int8", "LinearNarrowInt4": "int4", "LinearNarrowFp8": "fp8"}
EXPERTS = {"MoeExpertsNarrowInt8": "int8", "MoeExpertsNarrowInt4": "int4", "MoeExpertsNarrowFp8": "fp8"}
# The root mean square of numbers whose bytes are random, before their scales.
_RMS = {"int8": 73.9, "int4": 4.61, "fp8": 107.0}
# Of products in 16 bits, in ulps: nothing but the output is rounded. That is half an ulp of a number at most and 0.29
# in the root mean square, an ulp taken of the number's own power of two; float32's sums add a hundredth. Numbers
# or scales that were rounded to 16 bits on the way would add as much again.
_RMS_ONCE, _MAX_ONCE = 0.35, 0.6
_CODES = 256  # rows and columns of the matrix whose columns hold every code: two blocks of fp8 either way
_LONG = 1152  # columns whose sums are split, into pieces of unequal length


def cases(
    ops: Any, place: Place, sizes: Sizes, binaries: tuple[ShippedBinary, ...], few: bool, gpu: Gpu
) -> Iterator[Cases]:
    """Each op over narrow weights that is among `binaries`, with its cases."""
    shipped = {b.op for b in binaries}
    for op in sorted(shipped & set(LINEAR)):
        counts = token_counts(binaries, op)
        (unit,) = {b.constants["UNIT"] for b in binaries if b.op == op and "UNIT" in b.constants}
        shapes = matrices(sizes, unit, few)
        yield op, functools.partial(_linear, ops, place, LINEAR[op], counts, shapes, few)
    for op in sorted(shipped & set(EXPERTS)):
        counts = token_counts(binaries, op)
        yield op, functools.partial(_experts, ops, place, sizes, EXPERTS[op], counts, gpu)


def matrices(sizes: Sizes, unit: int, few: bool) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of a layer's matrices, of one whose sums are split, and of a part of the head unless `few`.

    `unit` is what all columns are multiples of; where it is less than a block, the split sums end within one.
    """
    long = _LONG - unit % 128
    own = [(sizes.width, sizes.hidden), (sizes.hidden, sizes.heads * sizes.value), (sizes.width, long)]
    own += [(sizes.hidden, sizes.shared * sizes.inter)] if sizes.shared else []
    return (*own, *([] if few else [(min(sizes.vocab, 2**15), sizes.hidden)]))


def weight(place: Place, format: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Random codes [.., N, B] of all values, and scales of both signs so that products of random tokens are near 1."""
    *stack, rows, columns = shape
    shape = (*stack, rows, stored(format, columns))
    codes = _bytes(torch.randint(0, 256, shape, device=place.device, dtype=torch.uint8), format)
    groups = -(-columns // GROUPS[format])
    of = (*stack, -(-rows // ROWS[format]), groups)
    signs = torch.randint(0, 2, of, device=place.device) * 2 - 1
    scales = (0.5 + torch.rand(of, device=place.device)) * signs / _RMS[format] / columns**0.5
    return codes, scales.float() if format == "fp8" else scales.half()


def stored(format: str, columns: int) -> int:
    """Bytes of so many codes."""
    return columns // 2 if format == "int4" else columns


def _bytes(values: Tensor, format: str) -> Tensor:
    """Codes of these values; of fp8 NaN, which no bundle holds, is the zero with a sign."""
    codes = values.to(torch.uint8)
    if format == "fp8":
        for nan in FP8_NANS:
            codes = codes.masked_fill_(codes == nan, 0x80)
    return codes


def _linear(
    ops: Any, place: Place, format: str, counts: Sequence[int], shapes: Sequence[tuple[int, int]], few: bool
) -> Iterator[float]:
    """All matrices in each bucket of token counts; where `few` are wanted the first one, the others with one token."""
    for tokens in counts:
        yield every_code(ops, place, format, tokens)
    for index, (rows, columns) in enumerate(shapes):
        operands = weight(place, format, rows, columns)
        for tokens in counts[:1] if few and index else counts:
            yield linear(ops, place, format, tokens, operands)


def every_code(ops: Any, place: Place, format: str, tokens: int) -> float:
    """0 where tokens that pick a column each give its very numbers, else infinite.

    Each column has every code, and scales are powers of two that differ from group to group: nothing is rounded.
    """
    rows = columns = _CODES
    across = stored(format, columns)
    at = torch.arange(rows, device=place.device)[:, None] + torch.arange(across, device=place.device)
    codes = _bytes(at % 256, format)
    groups = columns // GROUPS[format]
    of = (rows // ROWS[format], groups)
    place_of = torch.arange(of[0] * groups, device=place.device).view(of)
    scales = torch.pow(2.0, (place_of % 4 - 1).double()) * (1 - 2 * (place_of // 4 % 2))
    scales = scales.float() if format == "fp8" else scales.half()
    picked = torch.randperm(columns, device=place.device)[:tokens]
    x = torch.zeros(tokens, columns, device=place.device, dtype=place.dtype)
    x[torch.arange(tokens, device=place.device), picked] = 1
    actual = ops["LinearNarrow"](x, codes, scales, format, GROUPS[format])
    expected = numbers_of(format, codes, scales).T[picked]
    return 0.0 if torch.equal(actual.double(), expected) else float("inf")


def linear(ops: Any, place: Place, format: str, tokens: int, operands: tuple[Tensor, Tensor]) -> float:
    """Random tokens times a matrix."""
    numbers = numbers_of(format, *operands)
    x = place.random(tokens, numbers.shape[1])
    actual = ops["LinearNarrow"](x, *operands, format, GROUPS[format])
    return _once_rounded(actual, x.double() @ numbers.T, place.dtype)


def _once_rounded(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """As cases.error_of, with the tolerance of what is rounded once."""
    if not bool(actual.isfinite().all()):
        return float("inf")
    in_float32 = dtype == torch.float32
    rms, most = (RMS_ULPS[dtype], MAX_ULPS[dtype]) if in_float32 else (_RMS_ONCE, _MAX_ONCE)
    error, eps = (actual.double() - expected).abs(), torch.finfo(dtype).eps
    whole = float(error.norm() / (rms * eps * expected.norm()))
    return max(whole, float(error.max() / (most * eps * expected.abs().max())))


def stacks_bytes(sizes: Sizes) -> float:
    """At most, of all experts' codes."""
    return 3.0 * sizes.experts * sizes.hidden * sizes.inter


def expert_stacks(place: Place, sizes: Sizes, format: str) -> tuple[Tensor, ...]:
    """Codes and scales of gate, up [E, inter, ..] and down [E, hidden, ..], an expert at a time."""
    made: list[Tensor] = []
    for rows, columns in ((sizes.inter, sizes.hidden), (sizes.inter, sizes.hidden), (sizes.hidden, sizes.inter)):
        codes, scales = weight(place, format, rows, columns)
        stacks = [part.new_empty((sizes.experts, *part.shape)) for part in (codes, scales)]
        for expert in range(sizes.experts):
            for stack, part in zip(stacks, weight(place, format, rows, columns), strict=True):
                stack[expert] = part
        made += stacks
    return tuple(made)


def _experts(ops: Any, place: Place, sizes: Sizes, format: str, counts: Sequence[int], gpu: Gpu) -> Iterator[float]:
    needed = 1.2 * stacks_bytes(sizes) + 2**30
    if gpu.free_bytes() < needed:
        raise NotRunError(f"the experts need {needed / 1e9:.1f} GB; {gpu.free_bytes() / 1e9:.1f} GB are free")
    stacks = expert_stacks(place, sizes, format)
    for tokens in counts:
        yield experts(ops, place, sizes, format, tokens, stacks)


def experts(ops: Any, place: Place, sizes: Sizes, format: str, tokens: int, stacks: tuple[Tensor, ...]) -> float:
    """Routed experts of `tokens` tokens, weights as if chosen at random; rounded as whole ones are."""
    ids = torch.rand(tokens, sizes.experts, device=place.device).topk(sizes.top_k).indices.int()
    hidden = place.random(tokens, sizes.hidden)
    weights = torch.rand(tokens, sizes.top_k, device=place.device)
    actual = ops["MoeExpertsNarrow"](hidden, weights, ids, *stacks, "silu", format, GROUPS[format])
    wide = [NarrowStack(format, *stacks[at : at + 2]) for at in (0, 2, 4)]
    return error_of(actual, reference.expert_sum(hidden, weights, ids, *wide), place.dtype)
