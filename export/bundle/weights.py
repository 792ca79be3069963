"""The bundle's weights as arrays: mapped from its weights file, or assembled from the checkpoint it refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import numpy_dtype
from deepseek_trt.export.bundle.assemble import assemble
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.checkpoint import Checkpoint, read_header
from deepseek_trt.export.errors import BundleError


def weight_arrays(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    """All graph tensors by name, in the bundle's dtype (bfloat16 is ml_dtypes'); read-only where mapped."""
    if bundle.manifest.by_reference:
        return reference_arrays(bundle)
    file = bundle.path / WEIGHTS_FILE
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    arrays = {}
    for tensor in read_header(file):
        data = mapped[tensor.offset : tensor.offset + tensor.nbytes]
        arrays[tensor.name] = data.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)
    return arrays


def reference_arrays(bundle: Bundle, names: Iterable[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """Assemble a by-reference bundle's tensors (all, or those of `names`).

    Raises BundleError when the checkpoint is not the one that was exported.
    """
    tensors = Checkpoint.open(unchanged_checkpoint(bundle)).tensors
    wanted = None if names is None else set(names)
    weights = [w for w in bundle.manifest.weights if wanted is None or w.recipe.name in wanted]
    return {w.recipe.name: assemble(w.recipe, tensors, w.dtype) for w in weights}


def weight_source(bundle: Bundle) -> Callable[[str], npt.NDArray[Any]]:
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
        if not file.is_file():
            raise BundleError(f"{file} is missing: put the checkpoint back, or export again without --by-reference")
        stat = file.stat()
        if (stat.st_size, stat.st_mtime_ns) != (source.size, source.mtime_ns):
            raise BundleError(f"{file} has changed since export: export the checkpoint again")
    return root
