"""OrtPart: one part of the exported graphs in ONNX Runtime, cut out of them, with its weights alone in memory."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from deepseek_trt.engines.sessions.ort import Memory, open_graph, ort_values
from deepseek_trt.export.arrays import Array, Arrays, numpy_dtype
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import past_name, present_name
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.export.passes.widen import WidenBfloat16
from deepseek_trt.validate.backends.exported import inner_values
from deepseek_trt.validate.backends.probes import PLACES
from deepseek_trt.validate.layerwise.weights import BundleWeights
from deepseek_trt.validate.steps import Part, Step

HIDDEN = "hidden_states"  # the cut graph's input
_ONCE = Memory(packed=False, arena=False)  # the weights once, and nothing kept of what a step needed


class OrtPart:
    """Runs the part as TorchPart does; one of the two graphs is loaded at a time. bfloat16 is computed in float32."""

    def __init__(self, bundle: Bundle, part: Part, threads: int) -> None:
        self.dtype = computed_in(bundle.manifest.dtype)
        self._bundle, self._part, self._threads = bundle, part, threads
        self._weights = BundleWeights(bundle)
        self._read: dict[tuple[str, int | None], Array] = {}  # by name and place in the weights file
        self._experts: Arrays = {}
        self._loaded = ""
        self._entry = numpy_dtype(self.dtype)  # of the states

    def run(self, step: Step, hidden: Array | None, pool: Array | None) -> Arrays:
        if self._loaded != step.graph:
            self._load(step.graph)
        feeds = {**self._experts, **step.feeds}
        if hidden is not None:
            feeds[HIDDEN] = hidden.astype(self._entry)
        if pool is not None:
            feeds[past_name(self._part.index)] = pool.astype(numpy_dtype(self.dtype))
        wanted = sorted(set(self._names.values()))
        out = self._session.run(wanted, {name: feeds[name] for name in self._inputs})
        by_value = dict(zip(wanted, out, strict=True))
        return {name: by_value[value] for name, value in self._names.items()}

    def _load(self, graph: str) -> None:
        self._session: Any = None  # the other graph goes first
        model = ir.serde.deserialize_model(onnx.load_model_from_string(self._bundle.traced_bytes(graph)))
        self._names = cut(model, self._part)
        weights = self._give_weights(model)
        self._experts = {name: weights.pop(name) for name in _feed_experts(model)}
        WidenBfloat16()(model)
        self._inputs = [value.name or "" for value in model.graph.inputs]
        self._session = open_graph(
            self._bundle,
            graph,
            self._threads,
            model=ir.to_proto(model).SerializeToString(),
            name=f"{self._part.name} of {self._bundle.traced_path(graph)}",
            given=ort_values(weights),
            memory=_ONCE,
        )
        self._loaded = graph

    def _give_weights(self, model: ir.Model) -> Arrays:
        """What lies where the graph points to, in the dtype of the computation; the graph then asks for it by name.

        Of what the other graph used, the same is taken again and the rest dropped.
        """
        read = {}
        for name, value in model.graph.initializers.items():
            stored = value.const_value
            if not isinstance(stored, ir.ExternalTensor):
                continue
            kind = ir.DataType.FLOAT if stored.dtype == ir.DataType.BFLOAT16 else stored.dtype
            dtype = kind.numpy().name
            key = (name, stored.offset)
            read[key] = self._read[key] if key in self._read else self._weights.array(name, dtype, stored.offset)
            value.const_value = ir.ExternalTensor("given", None, None, kind, shape=stored.shape, name=name)
            value.dtype = kind
        self._read = read
        return {name: array for (name, _), array in read.items()}


def cut(model: ir.Model, part: Part) -> dict[str, str]:
    """Leave nothing in `model` but the part; gives the names of its outputs by probe name, "present" and "logits".

    What enters the part becomes the input HIDDEN.
    """
    found = inner_values(model)
    if not part.is_embedding:
        enter(model.graph, found[f"hidden.{part.index}"])
    exits = {f"hidden.{part.index + 1}": found[f"hidden.{part.index + 1}"]} if not part.is_head else {}
    if part.is_head:
        exits["logits"] = model.graph.outputs[0]
    if part.is_layer:
        inside = [f"{place}.{part.index}" for place in PLACES if place != "hidden"]
        exits |= {name: found[name] for name in inside if name in found}
        exits["present"] = next(v for v in model.graph.outputs if v.name == present_name(part.index))
    model.graph.outputs[:] = list(dict.fromkeys(exits.values()))
    passes.RemoveUnusedNodesPass()(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]
    return {name: value.name or "" for name, value in exits.items()}


def _feed_experts(model: ir.Model) -> list[str]:
    """Make inputs of the experts' weights, by far the largest: initializers ONNX Runtime copies, inputs it does not."""
    values = list(model.graph.initializers.values())
    fed = [v for v in values if all(node.op_type.startswith("MoeExperts") for node in v.consumers())]
    for value in fed:
        name = value.name or ""
        del model.graph.initializers[name]
        value.const_value = None
        model.graph.inputs.append(value)
    return [value.name or "" for value in fed]


def enter(graph: ir.Graph, hidden: ir.Value) -> None:
    """Let the input HIDDEN stand wherever `hidden` does."""
    entry = ir.Value(name=HIDDEN, type=hidden.type, shape=ir.Shape([None, None]))
    hidden.replace_all_uses_with(entry)
    graph.inputs.append(entry)
