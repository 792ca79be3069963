"""Planted faults: each is caught with exit code 3, and named in the right layer and op."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from deepseek_trt.cli.main import main
from deepseek_trt.cli.validate import EXIT_ACCURACY
from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.validate.accuracy import validate_bundle
from deepseek_trt.validate.request import ValidateRequest

pytestmark = pytest.mark.usefixtures("little_greed")
LAYER = 1  # where the faults are planted; the model's first MoE layer
SMALL = 1.001  # one part in a thousand


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


def insert_before(model, node, slot, op, constant, **attributes):
    """node.inputs[slot] becomes op(node.inputs[slot], constant)."""
    at = list(model.graph.node).index(node)
    made = helper.make_node("Constant", [], ["fault_constant"], value=numpy_helper.from_array(constant))
    inputs, outputs = [node.input[slot], "fault_constant"], ["fault_value"]
    model.graph.node.insert(at, made)
    model.graph.node.insert(at + 1, helper.make_node(op, inputs, outputs, **attributes))
    node.input[slot] = "fault_value"


def scale_constant(model, op, name, factor):
    body = own_body(model, node_of(model, op))
    next(n for n in body.node if n.output[0] == name).attribute[0].f *= factor


def softmax_scale(model):
    scale_constant(model, "Mla", "scale_f", SMALL)


def router_scale(model):
    scale_constant(model, "MoeRouter", "factor", SMALL)


def biased_router_scale(model):
    scale_constant(model, "MoeBiasedRouter", "factor", SMALL)


def rope_order(model):
    """Halves instead of adjacent pairs, for the queries."""
    rotations = [n for n in model.graph.node if n.op_type == "RotaryEmbedding"]  # query and key of each layer
    next(a for a in rotations[2 * LAYER].attribute if a.name == "interleaved").i = 0


def expert_permutation(model):
    """Every expert's down projection is that of another."""
    insert_before(model, node_of(model, "MoeExperts"), 5, "Gather", np.roll(np.arange(16), 1), axis=0)


def dropped_expert(model):
    insert_before(model, node_of(model, "MoeExperts"), 1, "Mul", np.array([[1, 1, 0]], dtype=np.float32))


def cache_off_by_one(model):
    insert_before(model, node_of(model, "Mla"), 4, "Add", np.array([1], dtype=np.int32))


def mask_off_by_one(model):
    """A query does not see itself."""
    body = own_body(model, node_of(model, "Mla"))
    next(n for n in body.node if n.op_type == "LessOrEqual").op_type = "Less"


def other_weight(model):
    """LAYER's output projection reads the next layer's."""
    name = "model.layers.{}.self_attn.o_proj.weight"
    found = {t.name: t for t in model.graph.initializer}
    ours, theirs = found[name.format(LAYER)], found[name.format(LAYER + 1)]
    del ours.external_data[:]
    ours.external_data.extend(theirs.external_data)


def changed_number(weight, shape):
    """A fault that adds 0.02, a quarter of the weights' standard deviation, to one number of a weight in LAYER."""

    def one_number(model):
        name = f"model.layers.{LAYER}.{weight}"
        node, slot = next((n, i) for n in model.graph.node for i, x in enumerate(n.input) if x == name)
        change = np.zeros(shape, dtype=np.float32)
        change.reshape(-1)[7] = 0.02
        insert_before(model, node, slot, "Add", change)

    return one_number


def one_number_of_o_proj(model):
    changed_number("self_attn.o_proj.weight", (64, 96))(model)


def one_number_of_the_router(model):
    changed_number("mlp.gate.weight", (16, 64))(model)


def biased_choice(model):
    """The correction biases of every second expert are off."""
    change = np.zeros(16, dtype=np.float32)
    change[::2] = 0.1
    insert_before(model, node_of(model, "MoeBiasedRouter"), 1, "Add", change)


FAULTS = [
    (softmax_scale, "prefill", "MlaPrefill"),
    (softmax_scale, "decode", "MlaDecode"),
    (rope_order, "decode", "query projection and rope"),
    (expert_permutation, "prefill", "MoeExperts"),
    (router_scale, "decode", "MoeRouter"),
    (dropped_expert, "prefill", "MoeExperts"),
    (cache_off_by_one, "decode", "MlaDecode"),
    (mask_off_by_one, "prefill", "MlaPrefill"),
    (other_weight, "decode", "output projection and residual"),
    (one_number_of_o_proj, "prefill", "output projection and residual"),
    (one_number_of_the_router, "decode", "router projection"),
]
BIASED_FAULTS = [(biased_router_scale, "decode", "MoeBiasedRouter"), (biased_choice, "prefill", "MoeBiasedRouter")]


def names(faults):
    return [f"{plant.__name__}-{graph}" for plant, graph, _ in faults]


def check(path, graph, op):
    """The command exits with 3 and names the op, the layer and the first step of the graph."""
    options = ("--backend", "exported", "--bisect", "--json", "--threads", "1")
    done = CliRunner().invoke(main, ["validate", str(path), *options])
    assert done.exit_code == EXIT_ACCURACY, done.output
    step = "prefill" if graph == "prefill" else "decode 0"
    first = json.loads(done.stdout)["backends"][0]["first_fault"]
    assert first.startswith(f"{op} in layer {LAYER} ")
    assert f"seeded: {step}," in first


@pytest.mark.parametrize(("plant", "graph", "op"), FAULTS, ids=names(FAULTS))
def test_planted_faults_are_named(edited, plant, graph, op):
    check(edited(plant, graph), graph, op)


@pytest.mark.parametrize(("plant", "graph", "op"), BIASED_FAULTS, ids=names(BIASED_FAULTS))
def test_faults_of_the_biased_router_are_named(edited, biased, plant, graph, op):
    check(edited(plant, graph, bundle=biased("float32")), graph, op)


def test_a_right_bundle_has_no_fault(good):
    report = validate_bundle(ValidateRequest(good("float32").path, ("exported",), bisect=True, threads=1)).report
    assert report.passed
    assert report.backends[0].first_fault is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_scale_that_leaves_the_tolerance_is_caught_in_every_dtype(good, edited, dtype):
    """The size of fault that a dtype's rounding hides, and no more.

    A right run may be off by all of the tolerance, the other way: from twice the tolerance on, a scale must show.
    """
    right = validate_bundle(ValidateRequest(good(dtype).path, ("exported",), bisect=True, threads=1)).report
    limit = next(v.tolerance for v in right.backends[0].inner if (v.place, v.layer) == ("router_weights", LAYER))

    def scale(model):
        scale_constant(model, "MoeRouter", "factor", 1 + 2.5 * limit)

    path = edited(scale, "prefill", "decode", bundle=good(dtype))
    report = validate_bundle(ValidateRequest(path, ("exported",), bisect=True, threads=1)).report
    fault = report.backends[0].first_fault
    assert (fault.op, fault.layer) == ("MoeRouter", LAYER)
