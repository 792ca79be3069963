"""WeightReader: the bundle's weights by name, out of its weights file or out of the checkpoint that it refers to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Array, Arrays, numpy_dtype
from deepseek_trt.export.bundle.assemble import assemble, one_run
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.narrow import SCALE
from deepseek_trt.export.bundle.proof import Progress, no_progress, stored_weights
from deepseek_trt.export.bundle.recipes import Piece
from deepseek_trt.export.bundle.widened import widened
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.files import stream_sha256
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.tensors import StoredTensor

Bytes = npt.NDArray[np.uint8]


class WeightReader:
    """Reads headers when it is made, and a tensor's numbers when it is asked for them.

    Arrays have the dtype of the tensor's record (bfloat16 is ml_dtypes') unless told otherwise. Raises BundleError
    where the weights file or the checkpoint is gone or has changed; `progress` is told where the file has to be hashed.
    """

    def __init__(self, bundle: Bundle, progress: Progress = no_progress) -> None:
        self.records = {weight.recipe.name: weight for weight in bundle.manifest.weights}
        self._file = bundle.path / WEIGHTS_FILE
        self._maps: dict[Path, Bytes] = {}
        self._by_reference = bundle.manifest.by_reference
        if self._by_reference:
            self._stored = Checkpoint.open(unchanged_checkpoint(bundle)).tensors
            _check_recipes(bundle, self._stored)
        else:
            bundle.prove_weights(progress)
            self._stored = stored_weights(self._file, bundle.manifest)

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor, as its record describes it."""
        return self.records[name].recipe.size * dtype_bytes(self.records[name].dtype)

    def place(self, name: str) -> tuple[Path, int] | None:
        """The file and offset where the tensor lies as it is; None where it has to be assembled."""
        if not self._by_reference:
            return self._file, self._stored[name].offset
        return one_run(self.records[name].recipe, self._stored, self.records[name].dtype)

    @cached_property
    def assembled(self) -> tuple[str, ...]:
        """The tensors that lie nowhere as they are: of a by-reference bundle, stacked experts mostly."""
        return tuple(name for name in self.records if self.place(name) is None)

    def view(self, name: str) -> Array:
        """The tensor where it lies in its mapped file, read-only; assembled where it lies nowhere as it is."""
        place = self.place(name)
        if place is None:
            return self.array(name)
        file, start = place
        return self._typed(name, self._mapped(file)[start : start + self.nbytes(name)])

    def views(self) -> Arrays:
        """Every tensor's `view` by name."""
        return {name: self.view(name) for name in self.records}

    def array(self, name: str, dtype: str | None = None, offset: int | None = None) -> Array:
        """The tensor in memory of its own, as `dtype`; never mapped, as pages of a mapped file count as memory.

        `offset` reads what lies there in the weights file in place of what its header names.
        """
        record = self.records[name]
        if self._by_reference:
            own = assemble(record.recipe, self._stored, record.dtype)  # as every export rounds it
            return own.astype(numpy_dtype(dtype or record.dtype), copy=False)
        stored = self.read(name, np.empty(self.nbytes(name), dtype=np.uint8), offset)
        return stored.astype(numpy_dtype(dtype or record.dtype), copy=False)

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The names of the model's weights: all but scales."""
        return tuple(name for name, record in self.records.items() if not record.recipe.is_scales)

    def numbers(self, name: str) -> Array:
        """The weight in memory of its own, in the dtype of its record; a narrow one widened to float32, exactly."""
        narrow = self.records[name].recipe.narrow
        if narrow is None:
            return self.array(name)
        return widened(self.array(name), self.array(f"{name}{SCALE}"), narrow)

    def read(self, name: str, into: Bytes, offset: int | None = None) -> Array:
        """Fill `into` [nbytes] with the tensor; gives it with the tensor's dtype and shape."""
        if self._by_reference:
            return assemble(self.records[name].recipe, self._stored, self.records[name].dtype, into)
        with self._file.open("rb") as stream:
            stream.seek(self._stored[name].offset if offset is None else offset)
            if stream.readinto(into.data) != into.size:
                raise BundleError(f"{self._file} ends inside {name}: export the checkpoint again")
        return self._typed(name, into)

    def sha256(self, name: str) -> str:
        """Hex digest of the tensor's bytes in the weights file, in bounded memory."""
        with self._file.open("rb") as stream:
            stream.seek(self._stored[name].offset)
            return stream_sha256(stream, self._stored[name].nbytes)

    def _mapped(self, file: Path) -> Bytes:
        if file not in self._maps:
            self._maps[file] = np.memmap(file, dtype=np.uint8, mode="r")
        return self._maps[file]

    def _typed(self, name: str, data: Bytes) -> Array:
        record = self.records[name]
        array: Array = data.view(numpy_dtype(record.dtype)).reshape(record.recipe.shape)
        return array


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


def _check_recipes(bundle: Bundle, stored: Mapping[str, StoredTensor]) -> None:
    """Every piece lies in the tensor that it names, and together they are as many numbers as the recipe says."""
    for weight in bundle.manifest.weights:
        numbers = [_numbers(piece, stored) for piece in weight.recipe.pieces]
        if None in numbers or sum(filter(None, numbers)) != weight.recipe.size:
            raise BundleError(
                f"{bundle.path}: the checkpoint {bundle.manifest.checkpoint} does not hold what {weight.recipe.name} "
                "is made of: export the checkpoint again"
            )


def _numbers(piece: Piece, stored: Mapping[str, StoredTensor]) -> int | None:
    """How many numbers the piece is; None where it is no part of the checkpoint."""
    source = stored.get(piece.source)
    if source is None or not source.shape or (piece.scale is not None and piece.scale not in stored):
        return None
    shape = (*source.shape, 1) if piece.halves and len(source.shape) == 1 else source.shape
    if piece.start + (piece.times - 1) * piece.step + piece.rows > math.prod(shape[:-1]):
        return None
    return piece.rows * piece.times * shape[-1]
