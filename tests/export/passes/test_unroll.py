"""A graph whose layers were traced once a kind and repeated is the graph that tracing every layer gives."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from deepseek_trt.export import trace as trace_module
from deepseek_trt.export.bundle.graph import CacheSpec, graphs_of
from deepseek_trt.export.config.model_config import ModelConfig

RAW = {
    "model_type": "deepseek_v2",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}


def run(model: ir.Model, weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    for name, array in weights.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize(("graph", "layers"), [(0, {"first_k_dense_replace": 1}), (1, {"moe_layer_freq": 2})])
def test_repeated_layers_equal_traced_ones(monkeypatch, graph, layers):
    config = ModelConfig.from_hf({**RAW, **layers, "num_hidden_layers": 4})
    spec = graphs_of(config, CacheSpec.of(config, "float32", 4))[graph]
    repeated = trace_module.trace(config, spec, "float32")
    monkeypatch.setattr(trace_module, "_distinct_layers", lambda config: (config, []))
    traced = trace_module.trace(config, spec, "float32")

    for values in ("inputs", "outputs"):
        assert [v.name for v in getattr(repeated.graph, values)] == [v.name for v in getattr(traced.graph, values)]
    assert set(repeated.graph.initializers) == set(traced.graph.initializers)
    kinds = [collections.Counter(node.op_type for node in model.graph) for model in (repeated, traced)]
    assert kinds[0] == kinds[1]

    rng = np.random.default_rng(0)
    shapes = {name: tuple(v.shape) for name, v in traced.graph.initializers.items() if name != trace_module.INV_FREQ}
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    feeds = {
        "input_ids": rng.integers(0, 48, (2, 5)),
        "sequence_lengths": np.array([5, 3], np.int32),
        "past_lengths": np.array([2, 6], np.int32),
        "page_table": np.array([[1, 2, 3], [4, 5, 6]], np.int32),
        **{v.name: rng.normal(size=(8, 4, 24)).astype(np.float32) for v in traced.graph.inputs if "past_k" in v.name},
    }
    feeds = {v.name: feeds[v.name] for v in traced.graph.inputs}
    for a, b in zip(run(repeated, weights, feeds), run(traced, weights, feeds), strict=True):
        assert np.array_equal(a, b)  # the same nodes in the same order: the same roundings


def test_nodes_grow_by_the_layer():
    counts = []
    for layers in (3, 4, 8):
        config = ModelConfig.from_hf({**RAW, "first_k_dense_replace": 1, "num_hidden_layers": layers})
        spec = graphs_of(config, CacheSpec.of(config, "float32"))[1]
        counts.append(len(trace_module.trace(config, spec, "float32").graph))
    assert counts[2] - counts[1] == 4 * (counts[1] - counts[0])
