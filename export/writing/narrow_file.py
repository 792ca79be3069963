"""Write a narrow weight into the weights file: scales and codes grow at their two places, a chunk at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np

from deepseek_trt.export.arrays import Array
from deepseek_trt.export.bundle.assemble import chunks, kept_chunks, packed_chunks
from deepseek_trt.export.bundle.narrow import FORMATS, PUBLISHED, Narrow
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.bundle.widened import widened_block
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.numbers import Tally
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.writing.quantize import WORST, Made, quantize
from deepseek_trt.export.writing.quantize_fp8 import quantize_blocks, rows_of_blocks
from deepseek_trt.export.writing.written import Progress, WrittenTensor

_ROUNDED = 1.05  # scales are rounded, too
_Parts = Callable[[Recipe, Narrow, Mapping[str, StoredTensor], Tally], Iterator[Made]]
_MEND = "export it whole, or leave it out of a file of rules"


@dataclass
class _Growing:
    """One of the two tensors: where its next bytes go, and the sha256 of those before."""

    at: int
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, out: BinaryIO, data: Array) -> int:
        raw = data.view(np.uint8).reshape(-1).data
        out.seek(self.at)
        out.write(raw)
        self.digest.update(raw)
        self.at += len(raw)
        return len(raw)


def write_narrow(
    out: BinaryIO,
    recipe: Recipe,
    scales_at: WrittenTensor,
    codes_at: WrittenTensor,
    tensors: Mapping[str, StoredTensor],
    progress: Progress,
) -> tuple[WrittenTensor, WrittenTensor]:
    """Both parts of the weight that `recipe` is the codes of; `out` stands behind them afterwards.

    Raises CheckpointError, naming the weight, where float16 cannot hold its scales, or its format a packed one.
    """
    assert recipe.narrow is not None
    scales, codes, tally = _Growing(scales_at.offset), _Growing(codes_at.offset), Tally(recipe, tensors)
    squares = errors = 0.0
    for made in _parts_of(recipe.narrow)(recipe, recipe.narrow, tensors, tally):
        squares, errors = squares + made.squares, errors + made.errors
        progress(scales.add(out, made.scales) + codes.add(out, made.codes))
    relative = (errors / squares) ** 0.5 if squares > 0 else 0.0
    if tally.is_finite and relative > _ROUNDED * WORST[recipe.narrow.format]:
        raise CheckpointError(_too_small(recipe.name, relative, recipe.narrow))
    written = replace(scales_at, sha256=scales.digest.hexdigest())
    return written, replace(codes_at, sha256=codes.digest.hexdigest(), odd=tally.odd, error=relative)


def _parts_of(narrow: Narrow) -> _Parts:
    if FORMATS[narrow.format].is_blocks:
        return _kept if narrow.method == PUBLISHED else _made_blocks
    return _taken if narrow.method == PUBLISHED else _made


def _made(recipe: Recipe, narrow: Narrow, tensors: Mapping[str, StoredTensor], tally: Tally) -> Iterator[Made]:
    """Codes and scales of whole numbers, a chunk at a time."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for chunk in chunks(recipe, tensors):
            tally.add(chunk)
            made = quantize(chunk, narrow, pool)
            if tally.is_finite and not np.isfinite(made.scales).all():
                raise CheckpointError(_too_large(recipe.name, chunk))
            yield made


def _made_blocks(recipe: Recipe, narrow: Narrow, tensors: Mapping[str, StoredTensor], tally: Tally) -> Iterator[Made]:
    """fp8 codes and scales of whole numbers, a row of blocks at a time."""

    def seen() -> Iterator[Array]:
        for chunk in chunks(recipe, tensors):
            tally.add(chunk)
            yield chunk

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for rows in rows_of_blocks(seen(), *recipe.whole_shape[-2:]):
            yield quantize_blocks(rows, pool)


def _kept(recipe: Recipe, narrow: Narrow, tensors: Mapping[str, StoredTensor], tally: Tally) -> Iterator[Made]:
    """fp8 codes and scales as the checkpoint has them."""
    for codes, scales in kept_chunks(recipe, tensors):
        tally.add(widened_block(codes, scales).reshape(-1))
        yield Made(codes, scales, 0.0, 0.0)


def _taken(recipe: Recipe, narrow: Narrow, tensors: Mapping[str, StoredTensor], tally: Tally) -> Iterator[Made]:
    """Codes and scales as a packed checkpoint has them."""
    is_int4 = narrow.format == "int4"
    zero = np.uint8(0x88 if is_int4 else 0)  # bytes of zeros
    for codes, scales in packed_chunks(recipe, tensors, is_int4):
        bytes_of_groups = codes.view(np.uint8).reshape(*scales.shape, -1)
        nonfinite = int((~np.isfinite(scales)).sum())
        is_zero = not ((scales != 0) & (bytes_of_groups != zero).any(axis=-1)).any()
        tally.count(scales.size * narrow.group, nonfinite * narrow.group, is_zero and not nonfinite)
        yield Made(codes, scales, 0.0, 0.0)


def _too_large(name: str, chunk: Array) -> str:
    largest = float(np.abs(chunk.astype(np.float32)).max())
    return f"{name} holds numbers up to {largest:.3g}, whose scales are beyond float16: {_MEND}"


def _too_small(name: str, relative: float, narrow: Narrow) -> str:
    return (
        f"{name} holds numbers so small that float16 cannot hold their scales: {narrow.format} would be {relative:.0%} "
        f"off: {_MEND}"
    )
