"""A bundle's weights read tensor by tensor: never mapped, as pages of a mapped file count as memory."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from deepseek_trt.export.arrays import Array, numpy_dtype
from deepseek_trt.export.bundle.assemble import assemble
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.weights import unchanged_checkpoint
from deepseek_trt.export.checkpoint import Checkpoint, StoredTensor, read_header
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.files import stream_sha256
from deepseek_trt.validate.backends.torch import tensor_of
from deepseek_trt.validate.steps import Part


class BundleWeights:
    """Out of the bundle's weights file, or by its recipes out of the checkpoint that it refers to.

    Raises BundleError where either is gone, or the checkpoint has changed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._file = bundle.path / WEIGHTS_FILE
        self._records = {w.recipe.name: w for w in bundle.manifest.weights}
        self._by_reference = bundle.manifest.by_reference
        if self._by_reference:
            self._tensors = Checkpoint.open(unchanged_checkpoint(bundle)).tensors
        elif self._file.is_file():
            self._tensors = {tensor.name: tensor for tensor in read_header(self._file)}
        else:
            raise BundleError(f"{self._file} is missing: export the checkpoint again")

    def array(self, name: str, dtype: str, offset: int | None = None) -> Array:
        """The tensor as `dtype`; where `offset` is given, what lies there in the weights file."""
        record = self._records[name]
        if self._by_reference:
            return assemble(record.recipe, self._tensors, dtype)
        stored = np.dtype(numpy_dtype(record.dtype))
        at = self._tensors[name].offset if offset is None else offset
        numbers = np.fromfile(self._file, dtype=np.uint8, count=record.recipe.size * stored.itemsize, offset=at)
        if numbers.size != record.recipe.size * stored.itemsize:
            raise BundleError(f"{self._file} ends inside {name}: export the checkpoint again")
        return numbers.view(stored).reshape(record.recipe.shape).astype(numpy_dtype(dtype), copy=False)

    def tensor(self, name: str) -> Tensor:
        """The tensor in the bundle's own dtype."""
        return tensor_of(self.array(name, self._records[name].dtype))

    def changed(self, part: Part) -> tuple[tuple[str, ...], int]:
        """The part's tensors whose sha256 is not the one that export recorded, and how many were looked at."""
        owned = {name: r.sha256 for name, r in self._records.items() if r.sha256 is not None and part.owns(name)}
        names = (name for name, digest in owned.items() if self._sha256(self._tensors[name]) != digest)
        return tuple(names), len(owned)

    @staticmethod
    def _sha256(tensor: StoredTensor) -> str:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            return stream_sha256(stream, tensor.nbytes)
