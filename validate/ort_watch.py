"""Watch ONNX Runtime at work: a second session over the same graphs, with inner values as further outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from deepseek_trt.engines.backends import SessionRequest
from deepseek_trt.engines.ort import _supply_references
from deepseek_trt.engines.session import Session
from deepseek_trt.engines.widen import WidenBfloat16
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.export.graph import DOMAIN, past_name
from deepseek_trt.export.weight_file import NUMPY_DTYPES
from deepseek_trt.validate.cases import Step
from deepseek_trt.validate.probes import Arrays, Probes


class OrtWatcher:
    """Repeats each step in a session that shows its inner values, and fills `probes` from it."""

    def __init__(self, request: SessionRequest, probes: Probes) -> None:
        self.probes = probes
        self._request = request
        self._graphs = {name: _Graph(request, name, probes.places) for name in ("prefill", "decode")}
        self._pools: Arrays = {}

    @contextmanager
    def watch(self, session: Session, index: int, step: Step) -> Iterator[None]:
        yield
        if step.starts_case:
            shape = (session.pages, session.cache.page_size, session.cache.latent_dim)
            dtype = NUMPY_DTYPES[session.cache.dtype]
            self._pools = {past_name(i): np.full(shape, np.nan, dtype) for i in range(session.cache.layers)}
        values, presents = self._graphs[step.graph].run(step, self._pools)
        self._pools = dict(zip(self._pools, presents, strict=True))
        for name, value in values.items():
            self.probes.keep(index, step, name, value)


class _Graph:
    """One graph with the values at `places` as outputs beside its own."""

    def __init__(self, request: SessionRequest, name: str, places: tuple[str, ...]) -> None:
        model = ir.serde.deserialize_model(onnx.load(request.bundle.graph_path(name), load_external_data=False))
        if request.bundle.manifest.dtype == "bfloat16":
            WidenBfloat16()(model)
        self._presents = [value.name or "" for value in model.graph.outputs][1:]
        found = {name: value for name, value in inner_values(model).items() if name.rpartition(".")[0] in places}
        model.graph.outputs.extend(value for value in found.values() if not value.is_graph_output())
        self._names = {name: value.name or "" for name, value in found.items()}
        self._inputs = {value.name for value in model.graph.inputs}
        self._session = _open(request, ir.to_proto(model).SerializeToString())

    def run(self, step: Step, pools: Arrays) -> tuple[Arrays, list[np.ndarray]]:
        """The values by probe name, and the new pools."""
        fields = ("input_ids", "sequence_lengths", "past_lengths", "page_table")
        feeds = {name: getattr(step, name) for name in fields if name in self._inputs} | pools
        wanted = sorted(set(self._names.values()))
        out = self._session.run([*wanted, *self._presents], feeds)
        by_value = dict(zip(wanted, out, strict=False))
        return {name: by_value[value] for name, value in self._names.items()}, out[len(wanted) :]


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
        elif node.domain == DOMAIN and node.op_type.startswith("MoeRouter"):
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


def _open(request: SessionRequest, model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = request.threads
    options.log_severity_level = 3
    bundle: Bundle = request.bundle
    kept = _supply_references(options, bundle) if bundle.manifest.by_reference else None
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    del kept
    return session
