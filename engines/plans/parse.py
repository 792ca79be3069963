"""Parse: a bundle's graph in TensorRT's hands, with plugins for its custom ops and its weights as inputs."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from deepseek_trt.engines.plans.flavour import Flavour
from deepseek_trt.engines.plans.fuse import fuse
from deepseek_trt.engines.plans.narrow_nodes import with_narrow_plugins
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import DOMAIN, GraphSpec, TensorSpec
from deepseek_trt.export.bundle.recipes import Part, tensorrt_parts
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.passes.share_weights import ShareWeights
from deepseek_trt.export.passes.split_weights import SplitWeights

# Ours by the names of trt.DataType.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
}


@dataclass(frozen=True)
class Parsed:
    """A graph in TensorRT's hands; builder, parser and model must outlive the network."""

    builder: Any
    parser: Any
    network: Any
    model: bytes
    weights: tuple[str, ...]
    plugins: dict[str, int]


def parse_graph(bundle: Bundle, graph: GraphSpec, spec: BuildSpec, flavour: Flavour, ops: Sequence[str] = ()) -> Parsed:
    """Parse the graph with plugins in place of the custom ops' bodies, and make sure that none fell back.

    `ops` are those that the loaded library has plugins for: some take the place of several of the graph.
    """
    trt = flavour.trt
    builder = trt.Builder(flavour.logger)
    network = builder.create_network(flavour.network_flags())
    parser = trt.OnnxParser(network, flavour.logger)
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    data, place = bundle.traced_bytes(graph.name), str(bundle.traced_path(graph.name))
    bundle.prove_weights()  # the parser reads the file by itself
    traced = onnx.load_model_from_string(data)
    changed = bundle.manifest.is_narrow or bundle.manifest.cache.narrow is not None
    if changed:
        traced = with_narrow_plugins(traced)
    model = ir.serde.deserialize_model(traced)
    changed |= fuse(model, graph.name, ops)
    wanted = collections.Counter(node.op_type for node in model.graph if node.domain == DOMAIN)
    weights: tuple[str, ...] = ()
    parts = {w.recipe.name: tensorrt_parts(w.recipe) for w in bundle.manifest.weights}
    split = {name for name, of in parts.items() if len(of) > 1}
    if spec.weights == "shared" or split:
        weights, data = _with_shared_weights(bundle, model, parts, None if spec.weights == "shared" else split)
    elif changed:
        data = ir.to_proto(model).SerializeToString()
    if not parser.parse(data, place):
        reason = flavour.log.last()
        if parser.num_errors:
            error = parser.get_error(0)
            reason = f"{error.node_name()} ({error.node_operator()}): {error.desc()}"
        raise BuildError(f"{flavour.name} cannot parse {graph.file}: {reason}")
    found = _plugins(network)
    if found != dict(wanted):
        raise BuildError(f"{graph.file}: plugins took over {found}, not {dict(wanted)}: build the plugin library again")
    return Parsed(builder, parser, network, data, weights, found)


def _with_shared_weights(
    bundle: Bundle, graph: ir.Model, parts: Mapping[str, Sequence[Part]], only: Collection[str] | None
) -> tuple[tuple[str, ...], bytes]:
    """The names of the weights that are inputs now (of `only` these), and the graph, small enough to travel as bytes.

    What TensorRT cannot take whole is in parts, and is never embedded.
    """
    for value in graph.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = str(bundle.path)
    share = ShareWeights(only)
    share(graph)
    split = SplitWeights(share.names, parts)
    split(graph)
    if bundle.manifest.by_reference:
        _embed_small(bundle, graph)
    return tuple(split.names), ir.to_proto(graph).SerializeToString()


def _embed_small(bundle: Bundle, model: ir.Model) -> None:
    """Give the small initializers of a by-reference bundle their data: they have no weights file to point into."""
    reader = WeightReader(bundle)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(reader.view(name), name=name)


def _plugins(network: Any) -> dict[str, int]:
    """Plugin layers by the op that they run; the parser names one after its node, which export names <Op>_<n>."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    plugins = (layer.name for layer in layers if layer.type.name == "PLUGIN_V3")
    return dict(collections.Counter(name.split("_", 1)[0] for name in plugins))


def layers_by_kind(network: Any) -> dict[str, int]:
    """How many layers of each kind the network has."""
    kinds = collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    return dict(sorted(kinds.items()))


def network_tensors(network: Any, kind: str) -> tuple[TensorSpec, ...]:
    """The network's tensors of a kind, "input" or "output"."""
    count = getattr(network, f"num_{kind}s")
    tensors = [getattr(network, f"get_{kind}")(i) for i in range(count)]
    return tuple(TensorSpec(t.name, DTYPES[t.dtype.name], tuple(int(d) for d in t.shape)) for t in tensors)
