"""TorchSession: the bundle's weights in the plain torch model. The reference, not a fast path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch

from deepseek_trt.engines.sessions.door import Door, check_cache_memory
from deepseek_trt.engines.sessions.loading import check_memory
from deepseek_trt.engines.sessions.session import GraphPair
from deepseek_trt.export.arrays import Array, Arrays, Floats
from deepseek_trt.export.bundle.folder import Bundle, WeightRecord
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.bundle.recipes import EMBEDDINGS, LM_HEAD
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.heads import Features, Logits, Scores, method_of
from deepseek_trt.export.model import DeepseekV2
from deepseek_trt.export.mtp.model import Mtp

Weights = Callable[[str], torch.Tensor]  # by the name of a graph tensor
Model = TypeVar("Model", bound=DeepseekV2 | Features | Scores)


class TorchSession(GraphPair):
    """Eager torch on the CPU, in float32 unless told otherwise."""

    backend = "torch"

    def __init__(
        self,
        bundle: Bundle,
        pages: int,
        dtype: str = "float32",
        weights: Weights | None = None,
        whole_cache: bool = False,
    ) -> None:
        """`weights` gives a graph tensor by its name; None takes the bundle's own. With `whole_cache` the cache is
        whole though the bundle's is narrow.
        """
        self.note = "" if dtype == bundle.manifest.dtype else f"{bundle.manifest.dtype} weights, computed in {dtype}"
        self.cache = computed_cache(bundle, dtype, whole_cache)
        self.pages, self.door = pages, Door.of(bundle, pages)
        check_cache_memory(self.cache, pages)
        self.model = load_model(bundle, dtype, weights)
        self.model.model.cache_as(self.cache.narrow)
        self._describe(bundle)
        self.mtp = load_mtp(bundle, self.model, dtype, weights) if self.drafts else None
        self._pools = empty_pools(self.cache, pages)

    def _describe(self, bundle: Bundle) -> None:
        self.drafts, self._interface = bundle.manifest.speculation is not None, bundle.manifest.interface

    @torch.inference_mode()
    def compute(self, graph: str, feeds: Arrays) -> Floats:
        given = [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values()]
        drafts = graph == "mtp"
        own = slice(-1, None) if drafts else slice(-1 if self.drafts else None)  # of the pools
        run = getattr(self.mtp if drafts else self.model, method_of(self._interface, graph))
        logits, *states, self._pools[own] = run(*given, self._pools[own])
        if states:
            self.hidden = _floats(states[0])
        return _floats(logits)

    def pools(self, layer: int) -> tuple[Array, ...]:
        """Views of codes and of float32, copies of other dtypes."""
        each = len(self.cache.pools)
        own = self._pools[layer * each : (layer + 1) * each]
        return tuple(pool.numpy() if pool.dtype == torch.int8 else _floats(pool) for pool in own)

    def fill(self, value: float) -> None:
        self._pools = [torch.full_like(p, 127 if p.dtype == torch.int8 else value) for p in self._pools]


def computed_cache(bundle: Bundle, dtype: str, whole: bool = False) -> CacheSpec:
    """The bundle's cache where torch computes in `dtype`."""
    cache = bundle.manifest.cache
    return dataclasses.replace(cache, dtype=dtype, narrow=None if whole else cache.narrow)


def empty_pools(cache: CacheSpec, pages: int) -> list[torch.Tensor]:
    """All pools, layer by layer."""
    each = [((pages, cache.page_size, pool.width), getattr(torch, pool.dtype)) for pool in cache.pools]
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in each * cache.layers]


def load_model(bundle: Bundle, dtype: str, weights: Weights | None = None) -> DeepseekV2:
    """The torch model with the bundle's weights, or with those given, converted to `dtype`."""
    with torch.device("meta"):
        model = Logits(bundle.manifest.model, bundle.manifest.interface)
    return with_weights(model, bundle, dtype, weights)


def load_mtp(bundle: Bundle, model: DeepseekV2, dtype: str, weights: Weights | None = None) -> Mtp:
    """The layer of multi-token prediction beside `model`, whose embeddings and output matrix it takes."""
    with torch.device("meta"):
        mtp = Mtp(bundle.manifest.model)
    shared = {name: tensor for name, tensor in model.state_dict().items() if name in (EMBEDDINGS, LM_HEAD)}
    own = _state(bundle.manifest.drafting_weights, dtype, weights or bundle_weights(bundle))
    mtp.load_state_dict({**shared, **own}, strict=True, assign=True)
    mtp.model.rope = model.model.rope
    mtp.eval()
    return mtp


def with_weights(model: Model, bundle: Bundle, dtype: str, weights: Weights | None = None) -> Model:
    """A model that was made on the meta device, with the bundle's weights or those given, converted to `dtype`."""
    if weights is None:
        _check_memory(bundle, dtype)
    rope = type(model.model.rope)(bundle.manifest.model)  # its frequencies are computed, not loaded
    state = _state(bundle.manifest.main_weights, dtype, weights or bundle_weights(bundle))
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rope = rope
    model.eval()
    return model


def _state(records: Iterable[WeightRecord], dtype: str, weights: Weights) -> dict[str, torch.Tensor]:
    """The records' tensors by name, converted to `dtype` but for those that are float32 in any model."""
    state = {}
    for record in (record for record in records if not record.recipe.is_scales):
        tensor, stays = weights(record.recipe.name), record.recipe.dtype("") == "float32"
        state[record.recipe.name] = tensor if stays else tensor.to(getattr(torch, dtype))
    return state


def _check_memory(bundle: Bundle, dtype: str) -> None:
    """BackendError where the parameters do not fit into memory."""
    check_memory(
        bundle.manifest.parameters * dtype_bytes(dtype),
        f"torch holds all parameters of {bundle.path} in {dtype}, which takes",
        "use --backend ort, which maps weights that do not fit, or a machine with more memory",
    )


def bundle_weights(bundle: Bundle) -> Weights:
    """The bundle's own weights, each read when it is asked for, in the dtype of its record; narrow ones in float32."""
    reader = WeightReader(bundle)
    return lambda name: as_tensor(reader.numbers(name))


def as_tensor(array: Array) -> torch.Tensor:
    """The array's memory as a tensor; ml_dtypes' bfloat16 goes through its bits, as torch does not know it."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _floats(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.float().numpy()
    return array
