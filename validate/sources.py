"""Weights one at a time, from the bundle's file or from the checkpoint that it refers to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt

from deepseek_trt.engines.weights import weight_arrays
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.export.checkpoint import Checkpoint
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.weight_file import assemble

Weights = Callable[[str], npt.NDArray[Any]]


def weight_source(bundle: Bundle) -> Weights:
    """A function from tensor name to array, which holds nothing in memory itself."""
    if not bundle.manifest.by_reference:
        return weight_arrays(bundle).__getitem__
    tensors = Checkpoint.open(unchanged_checkpoint(bundle)).tensors
    recipes = {w.recipe.name: w for w in bundle.manifest.weights}
    return lambda name: assemble(recipes[name].recipe, tensors, recipes[name].dtype)


def unchanged_checkpoint(bundle: Bundle) -> Path:
    """The folder that the bundle was exported from; BundleError where it is gone or its files have changed."""
    root = Path(bundle.manifest.checkpoint)
    for source in bundle.manifest.sources:
        file = root / source.name
        stat = file.stat() if file.is_file() else None
        if stat is None or (stat.st_size, stat.st_mtime_ns) != (source.size, source.mtime_ns):
            raise BundleError(f"{file} is not what it was at export: put it back, or export the checkpoint again")
    return root
