"""Planted faults: each is caught, and named in the right layer and op."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate_command import EXIT_ACCURACY
from deepseek_trt.export.graph import DOMAIN
from deepseek_trt.validate.accuracy import ValidateRequest, validate_bundle

LAYER = 1  # where the faults are planted; the model's first MoE layer


def node_of(model, op):
    """The custom op's node in LAYER; MoE ops start there."""
    nodes = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type.startswith(op)]
    return nodes[LAYER if op == "Mla" else 0]


def own_body(model, node):
    """Give the node a copy of its op's body, as all layers share one."""
    body = onnx.FunctionProto()
    body.CopyFrom(next(f for f in model.functions if f.name == node.op_type))
    body.name = node.op_type = f"{node.op_type}Faulty"
    model.functions.append(body)
    return model.functions[-1]


def insert_before(model, node, slot, op, constant):
    """node.inputs[slot] becomes op(node.inputs[slot], constant)."""
    at = list(model.graph.node).index(node)
    made = helper.make_node("Constant", [], ["fault_constant"], value=numpy_helper.from_array(constant))
    model.graph.node.insert(at, made)
    model.graph.node.insert(at + 1, helper.make_node(op, [node.input[slot], "fault_constant"], ["fault_value"]))
    node.input[slot] = "fault_value"


def softmax_scale(model):
    body = own_body(model, node_of(model, "Mla"))
    next(n for n in body.node if n.output[0] == "scale_f").attribute[0].f *= 1.01


def rope_order(model):
    """Halves instead of adjacent pairs, for the queries."""
    rotations = [n for n in model.graph.node if n.op_type == "RotaryEmbedding"]  # query and key of each layer
    next(a for a in rotations[2 * LAYER].attribute if a.name == "interleaved").i = 0


def expert_permutation(model):
    """Every expert's down projection is that of another."""
    node = node_of(model, "MoeExperts")
    order = np.roll(np.arange(16), 1)
    at = list(model.graph.node).index(node)
    made = helper.make_node("Constant", [], ["fault_order"], value=numpy_helper.from_array(order))
    model.graph.node.insert(at, made)
    model.graph.node.insert(at + 1, helper.make_node("Gather", [node.input[5], "fault_order"], ["fault_value"], axis=0))
    node.input[5] = "fault_value"


def router_scale(model):
    body = own_body(model, node_of(model, "MoeRouter"))
    next(n for n in body.node if n.output[0] == "factor").attribute[0].f *= 1.01


def dropped_expert(model):
    insert_before(model, node_of(model, "MoeExperts"), 1, "Mul", np.array([[1, 1, 0]], dtype=np.float32))


def cache_off_by_one(model):
    insert_before(model, node_of(model, "Mla"), 4, "Add", np.array([1], dtype=np.int32))


def mask_off_by_one(model):
    """A query does not see itself."""
    body = own_body(model, node_of(model, "Mla"))
    next(n for n in body.node if n.op_type == "LessOrEqual").op_type = "Less"


def wrong_weight(model):
    """LAYER's output projection reads the next layer's."""
    name = "model.layers.{}.self_attn.o_proj.weight"
    found = {t.name: t for t in model.graph.initializer}
    ours, theirs = found[name.format(LAYER)], found[name.format(LAYER + 1)]
    del ours.external_data[:]
    ours.external_data.extend(theirs.external_data)


FAULTS = [
    (softmax_scale, "prefill", "MlaPrefill"),
    (softmax_scale, "decode", "MlaDecode"),
    (rope_order, "decode", "query projection and rope"),
    (expert_permutation, "prefill", "MoeExperts"),
    (router_scale, "decode", "MoeRouter"),
    (dropped_expert, "prefill", "MoeExperts"),
    (cache_off_by_one, "decode", "MlaDecode"),
    (mask_off_by_one, "prefill", "MlaPrefill"),
    (wrong_weight, "decode", "output projection and residual"),
]


@pytest.mark.parametrize(
    ("plant", "graph", "op"), FAULTS, ids=[f"{plant.__name__}-{graph}" for plant, graph, _ in FAULTS]
)
def test_planted_faults_are_named(edited, plant, graph, op):
    path = edited(plant, graph)
    report = validate_bundle(ValidateRequest(path, bisect=True, threads=1)).report
    assert not report.passed
    assert report.changed_files == (f"{graph}.onnx",)
    fault = report.backends[0].first_fault
    assert (fault.layer, fault.op, fault.graph) == (LAYER, op, graph)
    assert fault.step == ("seeded: prefill" if graph == "prefill" else "seeded: decode 0")


def test_the_command_names_the_fault(edited):
    done = CliRunner().invoke(
        main, ["validate", str(edited(router_scale, "decode")), "--bisect", "--json", "--threads", "1"]
    )
    assert done.exit_code == EXIT_ACCURACY
    assert json.loads(done.stdout)["backends"][0]["first_fault"].startswith("MoeRouter in layer 1")


def test_a_right_bundle_has_no_fault(good):
    report = validate_bundle(ValidateRequest(good("float32").path, bisect=True, threads=1)).report
    assert report.passed
    assert report.backends[0].first_fault is None
