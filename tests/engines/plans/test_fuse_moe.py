"""The pass that makes one MoeLayer of a layer's router, experts and shared experts."""

from __future__ import annotations

import collections

import onnx
import onnx_ir as ir
import pytest

from deepseek_trt.engines.plans.fuse import fuse
from deepseek_trt.engines.plans.fuse_moe import FuseMoeLayer
from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.plugins.fused.moe_layer import MOE_LAYER


@pytest.fixture
def decode(demo_checkpoint, bundle_of) -> ir.Model:
    """The demo model's decode graph as TensorRT gets it, its ops' attributes and weights in it."""
    bundle = bundle_of(demo_checkpoint)
    return ir.serde.deserialize_model(onnx.load_model_from_string(bundle.traced_bytes("decode")))


def ops(model: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph if node.domain == DOMAIN))


def test_every_layer_of_experts_is_fused(decode):
    gemms = sum(node.op_type == "Gemm" for node in decode.graph)
    assert FuseMoeLayer()(decode).modified
    assert ops(decode) == {"MlaDecode": 5, "MoeLayer": 4}
    assert sum(node.op_type == "Gemm" for node in decode.graph) == gemms - 4 * 4  # logits and the shared experts' three
    assert not [
        node for node in decode.graph if not any(value.uses() or value.is_graph_output() for value in node.outputs)
    ]
    assert not FuseMoeLayer()(decode).modified
    place = {node: i for i, node in enumerate(decode.graph)}
    made = [(node, v.producer()) for node in decode.graph for v in node.inputs if v is not None and v.producer()]
    assert all(place[producer] < place[node] for node, producer in made), "a node comes before what it takes"


def test_the_layer_takes_what_its_parts_took(decode):
    router = next(node for node in decode.graph if node.op_type == "MoeRouter")
    given = {name: value.value for name, value in router.attributes.items()}
    FuseMoeLayer()(decode)
    layers = [node for node in decode.graph if node.op_type == "MoeLayer"]
    mlp = "model.layers.1.mlp"
    hidden, *weights = (value.name for value in layers[0].inputs)
    assert hidden == "layers.1.rms_norm_4" or hidden.startswith("layers.1.rms_norm")
    assert weights == [
        f"{mlp}.gate.weight",
        "moe_layer.no_bias",
        *(f"{mlp}.experts.{name}_proj" for name in ("gate", "up", "down")),
        *(f"{mlp}.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    ]
    assert {name: value.value for name, value in layers[0].attributes.items()} == {**given, "biased": 0}
    assert set(layers[0].attributes) == {attribute.name for attribute in MOE_LAYER.attributes}
    assert [layer.name for layer in layers] == [f"MoeLayer_{i}" for i in range(4)]
    zeros = decode.graph.initializers["moe_layer.no_bias"].const_value.numpy()
    assert zeros.tolist() == [0.0] * 16


def nodes_of(decode: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in decode.graph if node.op_type == op_type]


def with_other_activation(decode: ir.Model) -> None:
    nodes_of(decode, "MoeExperts")[1].attributes["activation"] = ir.AttrString("activation", "gelu")


def with_a_watched_value(decode: ir.Model) -> None:
    """Something else takes what lies between router and experts."""
    decode.graph.outputs.append(nodes_of(decode, "MoeRouter")[1].outputs[1])


def with_other_hidden_states(decode: ir.Model) -> None:
    """The shared experts take what the layer before took."""
    first, second = (node.inputs[0] for node in nodes_of(decode, "MoeExperts")[:2])
    for node, at in list(second.uses()):
        if node.op_type == "Gemm":
            node.replace_input_with(at, first)


@pytest.mark.parametrize("change", [with_other_activation, with_a_watched_value, with_other_hidden_states])
def test_what_does_not_match_stays(decode, change):
    change(decode)
    FuseMoeLayer()(decode)
    assert ops(decode) == {"MlaDecode": 5, "MoeLayer": 3, "MoeRouter": 1, "MoeExperts": 1}


@pytest.mark.parametrize(("name", "plugins"), [("prefill", ["MoeLayer"]), ("decode", ["MoeRouter", "MoeExperts"])])
def test_only_decode_is_fused_and_only_where_there_is_a_plugin(decode, name, plugins):
    assert not fuse(decode, name, plugins)
    assert fuse(decode, "decode", ["MoeLayer"])
