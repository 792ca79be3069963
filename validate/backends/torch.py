"""Torch sessions for validation: models larger than memory run layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_trt.engines.sessions.door import Door
from deepseek_trt.engines.sessions.torch import (
    TorchSession,
    Weights,
    bundle_weights,
    computed_cache,
    empty_pools,
    load_mtp,
)
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.free_memory import available_memory
from deepseek_trt.export.heads import Logits
from deepseek_trt.export.model import Rope


class StreamedTorchSession(TorchSession):
    """Reads each layer's weights when its turn comes and drops them after it: memory for one layer, much reading.

    Embeddings, the last norm and the head stay.
    """

    def __init__(
        self,
        bundle: Bundle,
        pages: int,
        dtype: str = "float32",
        weights: Weights | None = None,
        whole_cache: bool = False,
    ) -> None:
        self.note = f"{bundle.manifest.dtype} weights, computed in {dtype}, one layer in memory at a time"
        self.cache = computed_cache(bundle, dtype, whole_cache)
        self.pages, self.door = pages, Door.of(bundle, pages)
        self._weights, self._dtype = weights or bundle_weights(bundle), getattr(torch, dtype)
        self._own = {w.recipe.name for w in bundle.manifest.weights if w.recipe.dtype("") == "float32"}
        with torch.device("meta"):
            self.model = Logits(bundle.manifest.model, bundle.manifest.interface)
        self.model.model.rope = Rope(bundle.manifest.model)
        self.model.model.cache_as(self.cache.narrow)
        self._pools = empty_pools(self.cache, pages)
        kept = [name for name, _ in self.model.named_parameters() if not name.startswith("model.layers.")]
        self.model.load_state_dict({name: self._load(name) for name in kept}, strict=False, assign=True)
        for index, layer in enumerate(self.model.model.layers):
            self._stream(layer, f"model.layers.{index}.")
        self.model.eval()
        self._describe(bundle)
        self.mtp = load_mtp(bundle, self.model, dtype, self._weights) if self.drafts else None

    def _stream(self, layer: Any, prefix: str) -> None:
        """Load before the layer's first module, drop after its last."""
        names = [name for name, _ in layer.named_parameters()]

        def load(*_: object) -> None:
            layer.load_state_dict({name: self._load(prefix + name) for name in names}, assign=True)

        layer.input_layernorm.register_forward_pre_hook(load)
        layer.mlp.register_forward_hook(lambda *_: _drop(layer))

    def _load(self, name: str) -> Tensor:
        tensor = self._weights(name)
        return tensor if name in self._own else tensor.to(self._dtype)


def torch_session(
    bundle: Bundle, pages: int, dtype: str, weights: Weights | None = None, whole_cache: bool = False
) -> TorchSession:
    """Layer by layer where the weights in `dtype` would take more than half of the free memory.

    `weights` and `whole_cache` are those of TorchSession.
    """
    needed = bundle.manifest.parameters * dtype_bytes(dtype)
    kind = StreamedTorchSession if needed > available_memory() / 2 else TorchSession
    return kind(bundle, pages, dtype, weights, whole_cache)


def _drop(layer: nn.Module) -> None:
    empty = {name: torch.empty_like(parameter, device="meta") for name, parameter in layer.named_parameters()}
    layer.load_state_dict(empty, assign=True)
