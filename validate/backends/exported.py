"""ExportedSession: ONNX Runtime over the graphs as they were exported, with inner values as further outputs.

The session that is compared and the one that is watched are the same: in narrow dtypes a second one, optimised for
other outputs, may round otherwise and route otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from deepseek_trt.engines.sessions.door import Door
from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.ort import OrtValues, open_graph, referred_weights
from deepseek_trt.engines.sessions.pools import shapes_of
from deepseek_trt.engines.sessions.session import GraphPair, Session, widening_note
from deepseek_trt.export.arrays import Array, Arrays, Floats
from deepseek_trt.export.bundle.graph import DOMAIN, LAST_HIDDEN, past_name
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.validate.backends.probes import Probes
from deepseek_trt.validate.steps import Step


class ExportedSession(GraphPair):
    """Custom ops by their function bodies; bfloat16 bundles are computed in float32.

    `seen` holds the inner values of the last call, of the places that `show` named, by probe name.
    """

    backend = "exported"
    seen: Arrays

    def __init__(self, request: SessionRequest) -> None:
        manifest = request.bundle.manifest
        self.note = widening_note(manifest.dtype)
        self.cache = dataclasses.replace(manifest.cache, dtype=computed_in(manifest.dtype))
        self.pages, self.door = request.pages, Door.of(request.bundle, request.pages)
        self.drafts, self.seen = manifest.speculation is not None, {}
        self._request = request
        self._graphs: dict[str, _Graph] = {}
        self._weights = referred_weights(request.bundle)
        named = zip(self.cache.pool_names, shapes_of(self.cache, self.pages), strict=True)
        self._pools: Arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in named}
        self._places: tuple[str, ...] = ()

    def show(self, places: tuple[str, ...]) -> None:
        """Name the places of probes.PLACES to see, and load the graphs so that they show; before the first call."""
        self._places = places
        for graph in ("prefill", "decode"):
            self._loaded(graph)

    def pools(self, layer: int) -> tuple[Array, ...]:
        return tuple(self._pools[past_name(layer, pool.part)] for pool in self.cache.pools)

    def compute(self, graph: str, feeds: Arrays) -> Floats:
        names = list(self._pools)
        own = names[-1:] if graph == "mtp" else names[: len(names) - self.drafts]
        given, self.seen = self._loaded(graph).run(feeds | {name: self._pools[name] for name in own})
        self._pools |= {name: given[name.replace("past_key_values", "present")] for name in own}
        if self.drafts:
            self.hidden = given[LAST_HIDDEN]
        return given["logits"]

    def _loaded(self, graph: str) -> _Graph:
        if graph not in self._graphs:
            self._graphs[graph] = _Graph(self._request, graph, self._places, self._weights)
        return self._graphs[graph]


class OrtWatcher:
    """Fills `probes` from what an ExportedSession shows."""

    def __init__(self, probes: Probes) -> None:
        self.probes = probes

    @contextmanager
    def watch(self, session: Session, index: int, step: Step) -> Iterator[None]:
        shown: Any = session  # an ExportedSession
        shown.show(self.probes.places)
        yield
        for name, value in shown.seen.items():
            self.probes.keep(index, step, name, value)


class _Graph:
    """One graph with the values at `places` as outputs beside its own."""

    def __init__(self, request: SessionRequest, name: str, places: tuple[str, ...], weights: OrtValues | None) -> None:
        model = ir.serde.deserialize_model(onnx.load_model_from_string(request.bundle.graph_bytes(name)))
        self._outputs = [value.name or "" for value in model.graph.outputs]
        found = {name: value for name, value in inner_values(model).items() if name.rpartition(".")[0] in places}
        model.graph.outputs.extend(v for v in dict.fromkeys(found.values()) if not v.is_graph_output())
        self._names = {name: value.name or "" for name, value in found.items()}
        serialized = ir.to_proto(model).SerializeToString()
        self._session = open_graph(request.bundle, name, request.threads, model=serialized, shared=weights)

    def run(self, feeds: Arrays) -> tuple[Arrays, Arrays]:
        """The graph's outputs by name, and the values by probe name."""
        wanted = [*self._outputs, *sorted(set(self._names.values()) - set(self._outputs))]
        by_value = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
        given = {name: by_value[name] for name in self._outputs}
        return given, {name: by_value[value] for name, value in self._names.items()}


def inner_values(model: ir.Model) -> dict[str, ir.Value]:
    """The graph's values at each of probes.PLACES, found by what stands around them.

    A norm is known by its weight, a custom op by its type; layers are counted by their attention.
    """
    found: dict[str, ir.Value | None] = {}
    layer = -1
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            name = _weight_name(node)
            if name.endswith(".input_layernorm.weight"):
                found[f"hidden.{layer + 1}"] = node.inputs[0]
            elif name.endswith(".post_attention_layernorm.weight"):
                found[f"after_attention.{layer}"] = node.inputs[0]
        elif node.domain == DOMAIN and node.op_type.startswith("Mla"):
            layer += 1
            found |= {f"query.{layer}": node.inputs[0], f"latent.{layer}": node.inputs[1]}
            found[f"attended.{layer}"] = node.outputs[0]
        elif node.domain == DOMAIN and node.op_type.startswith(("MoeRouter", "MoeBiasedRouter")):
            found[f"router_logits.{layer}"] = node.inputs[0]
            found |= {f"router_weights.{layer}": node.outputs[0], f"router_ids.{layer}": node.outputs[1]}
        elif node.domain == DOMAIN and node.op_type.startswith("MoeExperts"):
            found[f"experts.{layer}"] = node.outputs[0]
    found[f"hidden.{layer + 1}"] = _last_output(found[f"after_attention.{layer}"])
    return {name: value for name, value in found.items() if value is not None}


def _last_output(after_attention: ir.Value | None) -> ir.Value | None:
    """The residual sum of the last layer: the Add that takes the state after its attention."""
    users = [node for node, _ in after_attention.uses() if node.op_type == "Add"] if after_attention else []
    return users[0].outputs[0] if users else None


def _weight_name(node: ir.Node) -> str:
    """The initializer behind the norm's weight, through a cast where the graph was widened."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return (value.name or "") if value is not None else ""
