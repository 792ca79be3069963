"""The passes that make one MlaQuery and one MlaValue of what stands around decode's attention."""

from __future__ import annotations

import collections

import onnx
import onnx_ir as ir
import pytest

from deepseek_trt.engines.plans.fuse import fuse
from deepseek_trt.engines.plans.fuse_mla import FuseMlaQuery, FuseMlaValue
from deepseek_trt.export.bundle.graph import DOMAIN

ALL = ["MlaQuery", "MlaValue", "MoeLayer"]


@pytest.fixture(params=["bfloat16", "float32"])
def decode(request, demo_checkpoint, bundle_of) -> ir.Model:
    """The demo model's decode graph as TensorRT gets it; in float32 nothing is cast for the rotation."""
    bundle = bundle_of(demo_checkpoint, dtype=request.param)
    return ir.serde.deserialize_model(onnx.load_model_from_string(bundle.traced_bytes("decode")))


def ops(model: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in model.graph if node.domain == DOMAIN))


def test_every_layers_attention_is_fused(decode):
    assert fuse(decode, "decode", ALL)
    assert ops(decode) == {"MlaQuery": 5, "MlaDecode": 5, "MlaValue": 5, "MoeLayer": 4}
    left = {node.op_type for node in decode.graph}
    assert not left & {"MatMul", "Transpose", "RotaryEmbedding", "Slice"}
    assert all(any(v.uses() or v.is_graph_output() for v in node.outputs) for node in decode.graph), "a node is unused"
    place = {node: i for i, node in enumerate(decode.graph)}
    made = [(node, v.producer()) for node in decode.graph for v in node.inputs if v is not None and v.producer()]
    assert all(place[producer] < place[node] for node, producer in made), "a node comes before what it takes"
    names = [value.name for node in decode.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert not fuse(decode, "decode", ALL)


def test_each_takes_what_its_parts_took(decode):
    fuse(decode, "decode", ALL)
    query = next(node for node in decode.graph if node.name == "MlaQuery_3")
    attention = "model.layers.3.self_attn"
    projections = [value.producer() for value in query.inputs[:2]]
    assert [node.inputs[1].name for node in projections] == [
        f"{attention}.q_b_proj.weight",
        f"{attention}.kv_a_proj_with_mqa.weight",
    ]
    assert [value.name for value in query.inputs[2:]] == [
        "cos",
        "sin",
        f"{attention}.kv_a_layernorm.weight",
        f"{attention}.w_uk",
    ]
    assert query.attributes.get_float("eps") == pytest.approx(1e-6)
    decoded = next(node for node in decode.graph if node.name == "MlaDecode_3")
    assert list(decoded.inputs[:2]) == list(query.outputs)
    value = next(node for node in decode.graph if node.name == "MlaValue_3")
    assert value.inputs[0] is decoded.outputs[0]
    assert value.inputs[1].name == f"{attention}.w_uv"
    (reshape, _), *_ = value.outputs[0].uses()
    (output, _), *_ = reshape.outputs[0].uses()
    assert output.inputs[1].name == f"{attention}.o_proj.weight"


def nodes_of(decode: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in decode.graph if node.op_type == op_type]


def with_halves_rotated(decode: ir.Model) -> None:
    nodes_of(decode, "RotaryEmbedding")[2].attributes["interleaved"] = ir.AttrInt64("interleaved", 0)


def with_other_angles(decode: ir.Model) -> None:
    nodes_of(decode, "RotaryEmbedding")[3].replace_input_with(1, decode.graph.node("node_sin").outputs[0])


def with_parts_apart(decode: ir.Model) -> None:
    """The second part of the queries begins elsewhere than where the first ends."""
    first, second = (node for node in nodes_of(decode, "Slice")[4:6])
    second.replace_input_with(1, first.inputs[1])


def with_heads_elsewhere(decode: ir.Model) -> None:
    absorbed = nodes_of(decode, "MatMul")[2].inputs[0].producer()
    absorbed.attributes["perm"] = ir.AttrInt64s("perm", [2, 0, 1])


@pytest.mark.parametrize(
    "change", [with_halves_rotated, with_other_angles, with_parts_apart, with_heads_elsewhere], ids=lambda c: c.__name__
)
def test_other_queries_stay(decode, change):
    change(decode)
    FuseMlaQuery()(decode)
    assert ops(decode)["MlaQuery"] == 4


def test_watched_values_stay(decode):
    decode.graph.outputs.append(nodes_of(decode, "MlaDecode")[1].outputs[0])
    FuseMlaValue()(decode)
    assert ops(decode)["MlaValue"] == 4


@pytest.mark.parametrize(("name", "plugins"), [("prefill", ALL), ("decode", ["MlaDecode"])])
def test_only_decode_is_fused_and_only_where_there_are_plugins(decode, name, plugins):
    assert not fuse(decode, name, plugins)
