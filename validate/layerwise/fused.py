"""FusedPart: one part of decode as generate runs it, cut out of the graph for the compiled CPU operators."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from deepseek_trt.engines.sessions.ort import ROUNDED, Memory, open_graph, ort_values
from deepseek_trt.engines.sessions.prepared import fused_graph
from deepseek_trt.export.arrays import Arrays
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import present_name
from deepseek_trt.export.text.wording import some
from deepseek_trt.plugins.cpu.library import CpuLibrary
from deepseek_trt.validate.backends.exported import inner_values
from deepseek_trt.validate.layerwise.ort import HIDDEN, OrtPart, enter
from deepseek_trt.validate.steps import Part

_ONCE = Memory(packed=False, folded=False, arena=False)  # the weights once, and nothing kept of what a step needed
_GIVEN = ("hidden.", "logits", "present")  # what a graph of fused operators shows


@dataclass(frozen=True)
class FusedDecode:
    """Decode of compiled operators without its weights, and its residual states by name: "hidden.N" and the value's.

    `data` is None where there is no library, and `note` says why, or what stays as it was exported.
    """

    data: bytes | None
    library: Path | None
    note: str
    hidden: dict[str, str]
    rounds_tokens: bool = False

    @classmethod
    def of(cls, bundle: Bundle, library: CpuLibrary, threads: int) -> FusedDecode:
        if library.path is None:
            return cls(None, None, library.reason, {})
        ctypes.CDLL(str(library.path)).deepseek_trt_cpu_threads(threads or len(os.sched_getaffinity(0)))
        data, left = fused_graph(bundle, "decode")
        note = f"as exported, not compiled: {some(left)}" if left else ""
        traced = ir.serde.deserialize_model(onnx.load_model_from_string(bundle.traced_bytes("decode")))
        states = {name: value for name, value in inner_values(traced).items() if name.startswith("hidden.")}
        rounds = bundle.manifest.rounds_tokens(left)
        note = "; ".join(filter(None, (ROUNDED if rounds else "", note)))
        return cls(data, library.path, note, {name: value.name or "" for name, value in states.items()}, rounds)


class FusedPart(OrtPart):
    """Runs prefill as OrtPart does, and decode by the compiled operators, which read weights in the bundle's dtype."""

    def __init__(self, bundle: Bundle, part: Part, threads: int, fused: FusedDecode) -> None:
        super().__init__(bundle, part, threads)
        self._fused = fused

    def _load(self, graph: str) -> None:
        if graph != "decode" or self._fused.data is None:
            super()._load(graph)
            self._names = {name: value for name, value in self._names.items() if name.startswith(_GIVEN)}
            return
        self._session, self._read, self._experts = None, {}, {}
        model = ir.serde.deserialize_model(onnx.load_model_from_string(self._fused.data))
        self._names = cut_fused(model, self._part, self._fused.hidden)
        entry = next((v for v in model.graph.inputs if v.name == HIDDEN), None)
        self._entry = entry.dtype.numpy() if entry is not None and entry.dtype is not None else self._entry
        self._inputs = [value.name or "" for value in model.graph.inputs]
        self._session = open_graph(
            self._bundle,
            graph,
            self._threads,
            model=ir.to_proto(model).SerializeToString(),
            name=f"{self._part.name} of decode for the compiled operators",
            given=ort_values(self._weights_of(model)),
            library=self._fused.library,
            memory=_ONCE,
        )
        self._loaded = graph

    def _weights_of(self, model: ir.Model) -> Arrays:
        """By their names, as generate gives them."""
        stored = model.graph.initializers.items()
        return {n: self._weights.array(n) for n, v in stored if isinstance(v.const_value, ir.ExternalTensor)}


def cut_fused(model: ir.Model, part: Part, hidden: dict[str, str]) -> dict[str, str]:
    """As `cut` does, of a graph whose operators hide what is inside a layer."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    # Between operators the states are float32, whatever the dtype; what casts them is gone where nobody asks for it.
    states = {name: values[f"{value}.cpu" if f"{value}.cpu" in values else value] for name, value in hidden.items()}
    if not part.is_embedding:
        enter(model.graph, states[f"hidden.{part.index}"])
    if part.is_head:
        exits = {"logits": model.graph.outputs[0]}
    else:
        exits = {f"hidden.{part.index + 1}": states[f"hidden.{part.index + 1}"]}
    if part.is_layer:
        exits["present"] = next(v for v in model.graph.outputs if v.name == present_name(part.index))
    model.graph.outputs[:] = list(exits.values())
    passes.RemoveUnusedNodesPass()(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]
    return {name: value.name or "" for name, value in exits.items()}
