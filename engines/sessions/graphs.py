"""GraphSession: any graph of any bundle, tensors in and tensors out by name; it keeps no cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from deepseek_trt.engines.sessions.session import widening_note
from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import GraphSpec
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.export.errors import BackendError, RequestError


class GraphSession(Protocol):
    """`note` says what a user should know about how it computes, or is empty."""

    backend: str
    note: str
    dtype: str  # that it computes in, and that its float inputs have

    def run(self, graph: str, feeds: Mapping[str, Array]) -> Arrays:
        """The graph's outputs by name, for its inputs by name; floats in float32 where the bundle is bfloat16."""


class OrtGraphs:
    """Through ONNX Runtime's CPU provider; a graph is loaded when it is first run."""

    backend = "ort"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._bundle, self._threads = bundle, threads
        self.note, self.dtype = widening_note(bundle.manifest.dtype), computed_in(bundle.manifest.dtype)
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, feeds: Mapping[str, Array]) -> Arrays:
        from deepseek_trt.engines.sessions.ort import open_graph

        if graph not in self._sessions:
            self._sessions[graph] = open_graph(self._bundle, graph, self._threads)
        spec = self._bundle.graph(graph)
        names = [output.name for output in spec.outputs]
        return dict(zip(names, self._sessions[graph].run(names, _in_order(spec, feeds)), strict=True))


class TorchGraphs:
    """Eager torch on the CPU, in float32 unless told otherwise: the reference."""

    backend = "torch"

    def __init__(self, bundle: Bundle, dtype: str = "float32") -> None:
        import torch

        from deepseek_trt.engines.sessions.torch import with_weights
        from deepseek_trt.export.heads import MODELS

        manifest = bundle.manifest
        self.note = "" if dtype == manifest.dtype else f"{manifest.dtype} weights, computed in {dtype}"
        labels = len(manifest.classifier.labels) if manifest.classifier else 0
        with torch.device("meta"):
            model = MODELS[manifest.task](manifest.model, manifest.interface, labels)
        self.dtype, self._torch_dtype = dtype, getattr(torch, dtype)
        self._bundle, self._model = bundle, with_weights(model, bundle, dtype)

    def run(self, graph: str, feeds: Mapping[str, Array]) -> Arrays:
        import torch

        from deepseek_trt.export.heads import run_graph

        spec = self._bundle.graph(graph)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in _in_order(spec, feeds).items()}
        given = {n: t.to(self._torch_dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        with torch.inference_mode():
            made = run_graph(self._model, self._bundle.manifest.interface, spec, given)
        return {name: tensor.float().numpy() for name, tensor in made.items()}


def _in_order(spec: GraphSpec, feeds: Mapping[str, Array]) -> Arrays:
    """The inputs as the graph lists them; BackendError, naming it, where one is missing or unknown."""
    names = [tensor.name for tensor in spec.inputs]
    wrong = sorted(set(names) ^ set(feeds))
    if wrong:
        kind = "lacks" if wrong[0] in names else "has no"
        raise BackendError(f"{spec.file} takes {', '.join(names)}: what it was given {kind} {wrong[0]}")
    return {name: feeds[name] for name in names}


GRAPH_BACKENDS: dict[str, Callable[[Bundle], GraphSession]] = {"ort": OrtGraphs, "torch": TorchGraphs}


def graph_session(bundle: Bundle, backend: str) -> GraphSession:
    """RequestError for a backend that there is not."""
    if backend not in GRAPH_BACKENDS:
        raise RequestError(f"backend {backend!r}: must be one of {', '.join(GRAPH_BACKENDS)}")
    return GRAPH_BACKENDS[backend](bundle)
