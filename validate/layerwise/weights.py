"""A bundle's weights read tensor by tensor, for a part of the model at a time."""

from __future__ import annotations

from torch import Tensor

from deepseek_trt.engines.sessions.torch import as_tensor
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.validate.steps import Part


class BundleWeights(WeightReader):
    """Also gives tensors for torch, and says whether those of a part are the exported ones."""

    def tensor(self, name: str) -> Tensor:
        """The weight in the dtype of its record, a narrow one in float32."""
        return as_tensor(self.numbers(name))

    def changed(self, part: Part) -> tuple[tuple[str, ...], int]:
        """The part's tensors whose sha256 is not the one that export recorded, and how many were looked at."""
        owned = {name: r.sha256 for name, r in self.records.items() if r.sha256 is not None and part.owns(name)}
        return tuple(name for name, digest in owned.items() if self.sha256(name) != digest), len(owned)
