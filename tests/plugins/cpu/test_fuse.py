"""The graph pass over every variant of the model: nothing is left as exported, and it computes the same."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.plugins.cpu.fuse import FuseForCpu, fused_bytes
from deepseek_trt.plugins.cpu.operators import ANGLES, CPU_DOMAIN, FEED_FORWARD, Operator

Run = Callable[[Session], list[np.ndarray[Any, Any]]]
# Widths that are no multiples of 16, so that every kernel meets its rest.
BASE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "torch_dtype": "float32",
    "vocab_size": 60,
    "hidden_size": 40,
    "intermediate_size": 36,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "hidden_act": "silu",
}
GROUPS = {"n_group": 4, "topk_group": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, query compression": {"q_lora_rank": 12, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "tied, relu, no shared experts": {"tie_word_embeddings": True, "hidden_act": "relu", "n_shared_experts": None},
    "groups, tanh": {**GROUPS, "topk_method": "group_limited_greedy", "hidden_act": "gelu_pytorch_tanh"},
    "sigmoid routing": {**GROUPS, "model_type": "deepseek_v3", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "float16": {"torch_dtype": "float16", "norm_topk_prob": True},
    "bfloat16": {"torch_dtype": "bfloat16"},
    "dense, ten heads, dynamic rope": {
        "n_routed_experts": None,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
}
# Of the largest logit. float32: sums in another order. Else the exported bodies round what they compute to float16
# (2^-11) or, where weights alone are narrow, compute in float32 too.
TOLERANCE = {"float16": 8 * 2.0**-11}


@pytest.fixture(scope="module")
def variant(weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    @functools.cache
    def make(name: str) -> Bundle:
        raw = {**BASE, **VARIANTS[name]}
        folder = tmp_path_factory.mktemp("variant")
        tensors = weights.random_weights(dict(weights.shapes_of(raw)))
        dtype = getattr(torch, raw["torch_dtype"])
        save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        return export_bundle(ExportRequest(folder, folder / "out", page_size=4)).bundle

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_fused_and_right(variant: Callable[[str], Bundle], decode_twice: Run, name: str) -> None:
    bundle = variant(name)
    exported, compiled = OrtSession(bundle, 40, 1, compiled=False), OrtSession(bundle, 40, 2)
    assert "as exported" not in compiled.note
    tolerance = TOLERANCE.get(bundle.manifest.dtype, 1e-5)
    for wanted, got in zip(decode_twice(exported), decode_twice(compiled), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    for layer in range(exported.cache.layers):
        a, b = (s.pool(layer)[1:].astype(np.float32) for s in (exported, compiled))  # page 0 is scratch
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_of_every_variant_is_right(variant: Callable[[str], Bundle], prefill_all: Run, name: str) -> None:
    bundle = variant(name)
    exported, compiled = OrtSession(bundle, 460, 1, compiled=False), OrtSession(bundle, 460, 2)
    tolerance = TOLERANCE.get(bundle.manifest.dtype, 1e-5)
    for wanted, got in zip(prefill_all(exported), prefill_all(compiled), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    for layer in range(exported.cache.layers):  # page 0 is scratch
        a, b = (s.pool(layer)[1:].astype(np.float32) for s in (exported, compiled))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.nanmax(np.abs(a)))


def test_prefill_equals_torch(variant: Callable[[str], Bundle], prefill_all: Run) -> None:
    bundle = variant("biases, query compression")
    for wanted, got in zip(
        prefill_all(TorchSession(bundle, 460)), prefill_all(OrtSession(bundle, 460, 2)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_is_not_recognised_stays_and_is_named(variant: Callable[[str], Bundle]) -> None:
    path = variant("plain").traced_path("decode")
    model = ir.serde.deserialize_model(onnx.load(path, load_external_data=False))
    mla = next(node for node in model.graph if node.op_type == "MlaDecode")
    rows = next(n for n in model.graph if n.op_type == "Reshape" and n.inputs[0] is mla.outputs[0])
    node = next(n for n in model.graph if n.op_type == "Transpose" and n.inputs[0] is rows.outputs[0])
    node.attributes["perm"] = ir.AttrInt64s("perm", [1, 2, 0])
    fuse = FuseForCpu()
    fuse(model)
    assert fuse.left == ["MlaDecode_0"]
    assert sum(n.domain == CPU_DOMAIN and n.op_type not in ANGLES for n in model.graph) == fuse.fused == 4


def test_of_a_prefill_too_what_is_not_recognised_stays(variant: Callable[[str], Bundle]) -> None:
    path = variant("plain").traced_path("prefill")
    model = ir.serde.deserialize_model(onnx.load(path, load_external_data=False))
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", 0)
    fuse = FuseForCpu()
    fuse(model)
    assert fuse.left == ["MlaPrefill_0"]
    assert sum(n.domain == CPU_DOMAIN and n.op_type not in ANGLES for n in model.graph) == fuse.fused == 4


def test_the_nodes_follow_the_tables(variant: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    path = variant("sigmoid routing").traced_path("decode")

    def inputs_of(operator: Operator) -> list[list[str | None]]:
        model = ir.serde.deserialize_model(onnx.load_from_string(fused_bytes(path.read_bytes())[0]))
        return [[i.name for i in node.inputs if i] for node in model.graph if node.op_type == operator.name]

    forwards = inputs_of(FEED_FORWARD)
    other = dataclasses.replace(FEED_FORWARD, inputs=FEED_FORWARD.inputs[::-1])
    monkeypatch.setattr("deepseek_trt.plugins.cpu.fuse.FEED_FORWARD", other)
    assert inputs_of(other) == [names[::-1] for names in forwards] != []


def test_no_weight_is_in_the_fused_graph(variant: Callable[[str], Bundle]) -> None:
    data, left = fused_bytes(variant("plain").traced_bytes("decode"))
    assert left == []
    initializers = onnx.load_from_string(data).graph.initializer
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in initializers if t.name != "model.rope.inv_freq")
