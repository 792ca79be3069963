"""Write a narrow weight into the weights file: scales and codes grow at their two places, a chunk at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np

from deepseek_trt.export.arrays import Array
from deepseek_trt.export.bundle.assemble import chunks
from deepseek_trt.export.bundle.narrow import Narrow
from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.numbers import Tally
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.writing.quantize import WORST, quantize
from deepseek_trt.export.writing.written import Progress, WrittenTensor

_ROUNDED = 1.05  # scales are rounded, too
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

    Raises CheckpointError, naming the weight, where float16 cannot hold its scales.
    """
    assert recipe.narrow is not None
    scales, codes, tally = _Growing(scales_at.offset), _Growing(codes_at.offset), Tally(recipe, tensors)
    squares = errors = 0.0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for chunk in chunks(recipe, tensors):
            tally.add(chunk)
            made = quantize(chunk, recipe.narrow, pool)
            if tally.is_finite and not np.isfinite(made.scales).all():
                raise CheckpointError(_too_large(recipe.name, chunk))
            squares, errors = squares + made.squares, errors + made.errors
            progress(scales.add(out, made.scales) + codes.add(out, made.codes))
    relative = (errors / squares) ** 0.5 if squares > 0 else 0.0
    if tally.is_finite and relative > _ROUNDED * WORST[recipe.narrow.format]:
        raise CheckpointError(_too_small(recipe.name, relative, recipe.narrow))
    written = replace(scales_at, sha256=scales.digest.hexdigest())
    return written, replace(codes_at, sha256=codes.digest.hexdigest(), odd=tally.odd, error=relative)


def _too_large(name: str, chunk: Array) -> str:
    largest = float(np.abs(chunk.astype(np.float32)).max())
    return f"{name} holds numbers up to {largest:.3g}, whose scales are beyond float16: {_MEND}"


def _too_small(name: str, relative: float, narrow: Narrow) -> str:
    return (
        f"{name} holds numbers so small that float16 cannot hold their scales: {narrow.format} would be {relative:.0%} "
        f"off: {_MEND}"
    )
