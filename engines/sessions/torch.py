"""TorchSession: the bundle's weights in the plain torch model. The reference, not a fast path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from deepseek_trt.export.arrays import Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.weights import weight_arrays
from deepseek_trt.export.heads import Features, Scores
from deepseek_trt.export.model import DeepseekV2

Weights = Callable[[str], torch.Tensor]  # by the name of a graph tensor
Model = TypeVar("Model", bound=DeepseekV2 | Features | Scores)


class TorchSession:
    """Eager torch on the CPU, in float32 unless told otherwise."""

    backend = "torch"

    def __init__(self, bundle: Bundle, pages: int, dtype: str = "float32", weights: Weights | None = None) -> None:
        """`weights` gives a graph tensor by its name; None takes the bundle's own."""
        self.note = "" if dtype == bundle.manifest.dtype else f"{bundle.manifest.dtype} weights, computed in {dtype}"
        self.cache = dataclasses.replace(bundle.manifest.cache, dtype=dtype)
        self.pages = pages
        self.model = load_model(bundle, dtype, weights)
        shape = (pages, self.cache.page_size, self.cache.latent_dim)
        self._pools = [torch.zeros(shape, dtype=getattr(torch, dtype)) for _ in range(self.cache.layers)]

    @torch.inference_mode()
    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        ids, lengths, past, table = _given(input_ids, sequence_lengths, past_lengths, page_table)
        logits, self._pools = self.model.prefill(ids, lengths, past, table, self._pools)
        return _floats(logits)

    @torch.inference_mode()
    def decode(self, input_ids: Int64s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        ids, past, table = _given(input_ids, past_lengths, page_table)
        logits, self._pools = self.model.decode(ids, past, table, self._pools)
        return _floats(logits)

    def pool(self, layer: int) -> npt.NDArray[Any]:
        return _floats(self._pools[layer])


def load_model(bundle: Bundle, dtype: str, weights: Weights | None = None) -> DeepseekV2:
    """The torch model with the bundle's weights, or with those given, converted to `dtype`."""
    with torch.device("meta"):
        model = DeepseekV2(bundle.manifest.model, bundle.manifest.all_logits)
    return with_weights(model, bundle, dtype, weights)


def with_weights(model: Model, bundle: Bundle, dtype: str, weights: Weights | None = None) -> Model:
    """A model that was made on the meta device, with the bundle's weights or those given, converted to `dtype`."""
    rope = type(model.model.rope)(bundle.manifest.model)  # its frequencies are computed, not loaded
    own = {w.recipe.name for w in bundle.manifest.weights if w.dtype != bundle.manifest.dtype}  # float32 in any model
    if weights is None:
        tensors = {name: _tensor(array) for name, array in weight_arrays(bundle).items()}
    else:
        tensors = {w.recipe.name: weights(w.recipe.name) for w in bundle.manifest.weights}
    state = {name: t if name in own else t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rope = rope
    model.eval()
    return model


def _given(*arrays: npt.NDArray[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A copy of the array; ml_dtypes' bfloat16 goes through its bits, as torch does not know it."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _floats(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.float().numpy()
    return array
