"""fp8 codes and scales of whole numbers: blocks of 128 x 128 whose largest number becomes the largest code, 448.

Blocks are independent of each other, so that the result depends neither on threads nor on how a weight is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from deepseek_trt.export.arrays import E4M3, Array, Floats
from deepseek_trt.export.bundle.narrow import BLOCK, FORMATS
from deepseek_trt.export.writing.quantize import Made

_STRIPE = 16 * BLOCK  # columns that a thread takes
_MOST = np.float32(FORMATS["fp8"].most)


def rows_of_blocks(chunks: Iterable[Array], rows: int, columns: int) -> Iterator[Floats]:
    """Numbers that pass in the order of matrices [rows, columns], as the rows of one row of blocks at a time.

    Each is gone when the next one is asked for.
    """
    sizes = itertools.cycle([min(BLOCK, rows - first) * columns for first in range(0, rows, BLOCK)])
    held = np.empty(min(BLOCK, rows) * columns, dtype=np.float32)
    size, filled = next(sizes), 0
    for chunk in chunks:
        at = 0
        while at < chunk.size:
            some = min(size - filled, chunk.size - at)
            held[filled : filled + some] = chunk[at : at + some]
            at, filled = at + some, filled + some
            if filled == size:
                yield held[:size].reshape(-1, columns)
                size, filled = next(sizes), 0


def quantize_blocks(rows: Floats, pool: ThreadPoolExecutor) -> Made:
    """Narrow the rows [n, K] of a row of blocks on the pool's threads: codes as bytes, scales [ceil(K / 128)]."""
    made = list(pool.map(lambda at: _stripe(rows[:, at : at + _STRIPE]), range(0, rows.shape[1], _STRIPE)))
    return Made(
        np.concatenate([part.codes for part in made], axis=1),
        np.concatenate([part.scales for part in made]),
        sum(part.squares for part in made),
        sum(part.errors for part in made),
    )


def _stripe(x: Floats) -> Made:
    columns = x.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that are none are said by the caller
        largest = np.maximum.reduceat(np.abs(x).max(axis=0), np.arange(0, columns, BLOCK))
        scales = _scales(largest)
        wide = np.repeat(scales, BLOCK)[:columns]
        q = np.divide(x, wide, out=np.zeros_like(x), where=wide != 0)
        codes = np.clip(q, -_MOST, _MOST, out=q).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)  # to nearest, to even
        error = x - E4M3[codes] * wide
        squares, errors = (float(np.einsum("ij,ij->", a, a, dtype=np.float64)) for a in (x, error))
    return Made(codes, scales, squares, errors)


def _scales(largest: Floats) -> Floats:
    """Of the largest numbers; where float32 has few digits left, away from zero, and where it ends, towards it."""
    scales: Floats = largest / _MOST
    short = (scales < np.finfo(np.float32).smallest_normal) & (scales * _MOST < largest)
    scales[short] = np.nextafter(scales[short], np.float32(np.inf))
    long = np.isfinite(scales) & np.isinf(scales * _MOST)
    scales[long] = np.nextafter(scales[long], np.float32(0))
    return scales
