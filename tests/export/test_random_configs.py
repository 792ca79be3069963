"""Random valid configurations, exported and compared with the numpy float64 model; for the night: -m slow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.export.exporter import ExportRequest, export_bundle

_spec = importlib.util.spec_from_file_location("semantics", Path(__file__).with_name("test_semantics.py"))
semantics = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(semantics)

# Shrinking a failure would export hundreds of models; the drawn configuration is small enough to read.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
KINDS = ("greedy", "group_limited_greedy", "noaux_tc")


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any] | None:
    kind = draw(st.sampled_from(["none", "linear", "dynamic", "yarn"]))
    if kind == "none":
        return None
    scaling = {draw(st.sampled_from(["type", "rope_type"])): kind, "factor": draw(st.sampled_from([2, 4.5, 40]))}
    optional = {"mscale_all_dim": st.sampled_from([0, 0.707, 1])}
    if kind == "yarn":
        optional |= {
            "original_max_position_embeddings": st.sampled_from([16, 300, 4096]),
            "beta_fast": st.sampled_from([4, 32.0]),
            "beta_slow": st.sampled_from([0.5, 1]),
            "mscale": st.sampled_from([0, 0.707, 1]),
        }
    return {**scaling, **draw(st.fixed_dictionaries({}, optional=optional))}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    method, groups = draw(st.sampled_from(KINDS)), draw(st.sampled_from([1, 2, 4]))
    in_group = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    limited = method != "greedy"
    return {
        "model_type": "deepseek_v3" if method == "noaux_tc" else "deepseek_v2",
        "torch_dtype": "float32",
        "vocab_size": draw(st.integers(10, 70)),
        "hidden_size": draw(st.integers(8, 40)),
        "intermediate_size": draw(st.integers(8, 40)),
        "moe_intermediate_size": draw(st.integers(4, 24)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": draw(st.integers(1, 5)),
        "num_key_value_heads": draw(st.integers(1, 5)),
        "q_lora_rank": draw(st.none() | st.integers(4, 24)),
        "kv_lora_rank": draw(st.integers(4, 24)),
        "qk_nope_head_dim": draw(st.integers(2, 16)),
        "qk_rope_head_dim": draw(st.sampled_from([4, 6, 8, 16])),
        "v_head_dim": draw(st.integers(2, 16)),
        "topk_method": method,
        "n_routed_experts": groups * in_group,
        "n_shared_experts": draw(st.sampled_from([None, 1, 2])),
        "num_experts_per_tok": draw(st.integers(1, (kept if limited else groups) * in_group)),
        "n_group": groups if limited else None,
        "topk_group": kept if limited else None,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2, 16.0])),
        "first_k_dense_replace": draw(st.integers(0, 3)),
        "moe_layer_freq": draw(st.integers(1, 3)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_new", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_interleave": method != "noaux_tc" or draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([500, 10000.0])),
        "rope_scaling": draw(ropes()),
        "max_position_embeddings": draw(st.sampled_from([8, 2048])),
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(raw=configs(), seed=st.integers(0, 1000))
def test_random_configuration(tmp_path_factory, reference, weights_of, save, float64_of, raw, seed):
    tensors = weights_of(raw, seed)
    folder = tmp_path_factory.mktemp("random")
    checkpoint = save(folder / "checkpoint", raw, {"model.safetensors": tensors}, index=False)
    bundle = export_bundle(ExportRequest(checkpoint, folder / "out", page_size=4)).bundle
    session = OrtSession(bundle, pages=12, threads=1)
    semantics.assert_equals_reference(session, reference, raw, float64_of(tensors))
