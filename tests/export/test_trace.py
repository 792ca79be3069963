"""The traced graphs: what they hold, what they must not hold, and that nothing of the example is baked in."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
import torch

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.bundle.graph import CacheSpec, graphs_of
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.ops import OPS
from deepseek_trt.export.trace import trace

GRAPHS = ("prefill", "decode")
OPS_OF = {"prefill": "MlaPrefill", "decode": "MlaDecode"}
DATA_DEPENDENT = {"NonZero", "Unique", "Loop", "If", "Scan", "Compress"}


def load(bundle, graph: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(graph), load_external_data=False)


@pytest.fixture(scope="module")
def bundle(small, bundle_of):
    return bundle_of(small.checkpoint, dtype="float32", page_size=8)


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_is_valid_and_its_io_is_the_spec(bundle, graph):
    onnx.checker.check_model(str(bundle.graph_path(graph)))
    model, spec = load(bundle, graph), bundle.graph(graph)
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        found = []
        for value in values:
            dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
            found.append((value.name, {"float": "float32"}.get(kind, kind), dims))
        assert found == [(t.name, t.dtype, t.dims) for t in tensors]


@pytest.mark.parametrize("graph", GRAPHS)
def test_custom_ops_are_single_nodes_with_bodies(bundle, small, graph):
    model = load(bundle, graph)
    kinds = collections.Counter(n.op_type for n in model.graph.node if n.domain == "deepseek_trt")
    layers, sparse = small.raw["num_hidden_layers"], small.raw["num_hidden_layers"] - 1
    assert kinds == {OPS_OF[graph]: layers, "MoeRouter": sparse, "MoeExperts": sparse}
    assert {f.name for f in model.functions} == set(kinds)
    specs = {op.name: op for op in OPS}
    for function in model.functions:
        spec = specs[function.name]
        assert list(function.attribute) == [a.name for a in spec.attributes]
        assert list(function.input) == [i.name for i in spec.inputs]
    assert not {n.op_type for n in model.graph.node} & DATA_DEPENDENT


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_complex_and_no_path_of_this_machine(bundle, graph):
    text = bundle.graph_path(graph).read_bytes()
    complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    model = onnx.shape_inference.infer_shapes(load(bundle, graph))
    assert not {v.type.tensor_type.elem_type for v in model.graph.value_info} & complex_types
    assert b"site-packages" not in text
    assert b".py" not in text


def test_weights_are_stored_once_for_both_graphs(bundle):
    places = []
    for graph in GRAPHS:
        external = {}
        for initializer in load(bundle, graph).graph.initializer:
            entries = {e.key: e.value for e in initializer.external_data}
            if entries:
                external[initializer.name] = (entries["location"], entries["offset"], entries["length"])
        places.append(external)
    assert places[0] == places[1]
    assert {location for location, _, _ in places[0].values()} == {WEIGHTS_FILE}
    assert len(places[0]) == len(bundle.manifest.weights)


def test_node_count_does_not_depend_on_the_number_of_experts(small):
    counts = []
    for experts in (16, 64):
        config = ModelConfig.from_hf({**small.raw, "n_routed_experts": experts, "num_hidden_layers": 2})
        graph = graphs_of(config, CacheSpec.of(config, "float32"))[1]
        counts.append(len(trace(config, graph, "float32").graph))
    assert counts[0] == counts[1]


def test_tracing_needs_no_weights_in_memory():
    """V2-Lite's layers are 0.6 billion parameters each: that two of them trace at all shows that none is real."""
    raw = {"model_type": "deepseek_v2", "hidden_size": 5120, "n_routed_experts": 160, "num_experts_per_tok": 6}
    config = ModelConfig.from_hf({**raw, "moe_intermediate_size": 1536, "num_hidden_layers": 2, "v_head_dim": 128})
    graph = graphs_of(config, CacheSpec.of(config, "bfloat16"))[1]
    model = trace(config, graph, "bfloat16")
    data = model.graph.initializers["model.layers.1.mlp.experts.gate_proj"].const_value
    assert isinstance(data.raw, torch._subclasses.FakeTensor)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (5, 3), (3, 31)])
def test_other_batches_lengths_and_prompts_agree_with_torch(bundle, rows, length):
    ort_session, reference = OrtSession(bundle, 64), TorchSession(bundle, 64)
    ids = np.random.default_rng(length).integers(2, 256, (rows, length + 1))
    width = -(-(length + 1) // 8)
    table = (1 + np.arange(rows * width, dtype=np.int32)).reshape(rows, width)
    lengths = np.full(rows, length, np.int32)
    for run in (
        lambda s: s.prefill(ids[:, :length], lengths, np.zeros(rows, np.int32), table),
        lambda s: s.decode(ids[:, length:], np.ones_like(lengths), lengths, table),
    ):
        ours, theirs = run(ort_session), run(reference)
        # two float32 computations of the same sums: see RELATIVE in test_cache_semantics
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# Unit roundoffs; a bfloat16 bundle is computed in float32 by this backend, over the same bfloat16 weights.
# float16 rounds each layer's dozen intermediate results by 2**-11 once; the errors of 3 layers add up in the residual
# stream to a few roundings, and 20 bounds their maximum over some thousand logits.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 20 * 2.0**-11), ("bfloat16", 1e-5)])
def test_other_dtypes_run(small, bundle_of, dtype, tolerance):
    bundle = bundle_of(small.checkpoint, dtype=dtype, page_size=8)
    ort_session, reference = OrtSession(bundle, 16), TorchSession(bundle, 16)
    assert ("float32" in ort_session.note) == (dtype == "bfloat16")
    ids = np.random.default_rng(0).integers(2, 256, (1, 20))
    table = np.array([[1, 2, 3]], dtype=np.int32)
    feeds = (np.array([20], np.int32), np.array([0], np.int32), table)
    ours, theirs = ort_session.prefill(ids, *feeds), reference.prefill(ids, *feeds)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_all_logits(small, bundle_of):
    last = bundle_of(small.checkpoint, dtype="float32", page_size=8)
    every = bundle_of(small.checkpoint, dtype="float32", page_size=8, all_logits=True)
    ids = np.random.default_rng(0).integers(2, 256, (1, 9))
    feeds = (np.array([9], np.int32), np.array([0], np.int32), np.array([[1, 2]], dtype=np.int32))
    expected = OrtSession(last, 4).prefill(ids, *feeds)
    logits = OrtSession(every, 4).prefill(ids, *feeds)
    assert logits.shape == (1, 9, 256)
    np.testing.assert_allclose(logits[:, -1], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
