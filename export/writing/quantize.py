"""Whole numbers and scales of floats: groups of 32 numbers that share a float16 scale, found by one of two methods.

Groups are independent of each other, and sums over one are added in one order, so that the result depends neither on
threads nor on how a weight is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Array, Floats
from deepseek_trt.export.bundle.narrow import ABSMAX, FORMATS, LEAST_SQUARES, Format, Narrow

_NORMAL = np.finfo(np.float16).smallest_normal
_BLOCK = 2048  # groups at a time: what a thread works on stays in its cache
# By what the largest number of a group is divided to find scales that are tried.
_DIVISORS = {"int4": tuple(7.0 + 0.3 * i for i in range(11)), "int8": (126.5, 127.0, 127.5)}
# A group whose scale is right is that near to its numbers, whatever they are: half a step for each of them, relative to
# the largest alone. What lies farther away has scales that float16 cannot hold. Of fp8, half a step is a share of each.
WORST = {"int8": 0.5 * 32**0.5 / 127, "int4": 0.5 * 32**0.5 / 7, "fp8": 2.0**-4}


@dataclass(frozen=True)
class Made:
    """Codes as bytes [groups, bytes of a group], scales [groups], and squares summed of numbers and of their errors."""

    codes: Array
    scales: Array
    squares: float
    errors: float


def quantize(numbers: Array, narrow: Narrow, pool: ThreadPoolExecutor) -> Made:
    """Narrow a run of whole groups, on the pool's threads. Scales that float16 cannot hold come out infinite."""
    groups = numbers.reshape(-1, narrow.group)
    starts = range(0, len(groups), _BLOCK)
    made = list(pool.map(lambda at: _block(groups[at : at + _BLOCK], narrow), starts))
    return Made(
        np.concatenate([part.codes for part in made]),
        np.concatenate([part.scales for part in made]),
        sum(part.squares for part in made),
        sum(part.errors for part in made),
    )


def _block(groups: Array, narrow: Narrow) -> Made:
    x = np.ascontiguousarray(groups.T, dtype=np.float32)  # [group, groups]: sums are of rows, in order
    kind = FORMATS[narrow.format]
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that are none, or too large, are said by the caller
        scales = _rounded(_METHODS[narrow.method](x, kind))
        wide = scales.astype(np.float32)
        q = _codes(x, np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0), kind)
        error = x - q * wide
        squares, errors = (float(np.einsum("ij,ij->", a, a, dtype=np.float64)) for a in (x, error))
        return Made(_packed(q, kind), scales, squares, errors)


def _rounded(scales: Floats) -> Array:
    """In float16; where that has few digits left, away from zero, as codes would not reach the largest number else."""
    near = scales.astype(np.float16)
    short = (np.abs(near) < _NORMAL) & (np.abs(near.astype(np.float32)) < np.abs(scales))
    near[short] = np.nextafter(near[short], np.copysign(np.float16(np.inf), near[short]))
    return near


def _codes(x: Floats, inverse: Floats, kind: Format, out: Floats | None = None) -> Floats:
    q: Floats = np.multiply(x, inverse, out=out)
    np.rint(q, out=q)
    np.clip(q, kind.least, kind.most, out=q)
    return q


def _absmax(x: Floats, kind: Format) -> Floats:
    """The largest number becomes the largest code."""
    scales: Floats = np.abs(x).max(axis=0) / kind.most
    return scales


def _least_squares(x: Floats, kind: Format) -> Floats:
    """Of several scales the one with the least squared error, each improved: for codes q it is (x q) / (q q).

    Where codes reach further below zero than above, the largest number becomes the lowest code, by a scale of its sign.
    """
    most, least = x.max(axis=0), x.min(axis=0)
    largest, reach = np.maximum(most, -least), max(kind.most, -kind.least)
    sign = np.where((most >= -least) & (reach > kind.most), np.float32(-1.0), np.float32(1.0))
    unit = np.divide(sign, largest, out=np.zeros_like(largest), where=largest != 0)
    best: Floats = np.zeros_like(largest)
    scales: Floats = np.zeros_like(largest)
    q, product = np.empty_like(x), np.empty_like(x)
    for divisor in _DIVISORS[kind.name]:
        _codes(x, unit * np.float32(divisor), kind, out=q)
        xq = np.add.reduce(np.multiply(x, q, out=product), axis=0)
        qq = np.maximum(np.add.reduce(np.multiply(q, q, out=product), axis=0), np.float32(1.0))
        scale = xq / qq
        gain = scale * xq  # by how much the squared error is less than that of zeros
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scales, scale, where=better)
    return scales


_METHODS: dict[str, Callable[[Floats, Format], Floats]] = {ABSMAX: _absmax, LEAST_SQUARES: _least_squares}


def _packed(q: Floats, kind: Format) -> Array:
    """[groups, bytes of a group]"""
    if kind.packed == 1:
        return np.ascontiguousarray(q.T.astype(np.int8)).view(np.uint8)
    biased = (q + kind.bias).astype(np.uint8)
    return np.ascontiguousarray((biased[0::2] | (biased[1::2] << 4)).T)
