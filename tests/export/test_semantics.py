"""The semantics matrix: each variant of the model, exported and run in ONNX Runtime, equals the numpy float64 model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.torch import TorchSession

# float32 rounds by 2**-24 = 6e-8. A logit is the end of a chain of some 20 sums of 16 to 160 products a layer, whose
# rounding errors add up like sqrt(terms): 6e-8 * 20 * sqrt(160) = 1.5e-5 of the largest logit, for the worst of them.
RELATIVE = 2e-5

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 512,
    "beta_fast": 8,
    "beta_slow": 0.5,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}
BASE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "rope_theta": 10000,
    "rope_scaling": {**YARN, "mscale_all_dim": 0.707},
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
V3 = {
    **BASE,
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
}
GREEDY = {"topk_method": "greedy", "n_group": None, "topk_group": None}
MODELS: dict[str, dict[str, Any]] = {
    "v2": BASE,
    "v2-lite": {**BASE, **GREEDY, "q_lora_rank": None, "routed_scaling_factor": 1.0},
    "normalised, biases, eps": {
        **BASE,
        "norm_topk_prob": True,  # and routed_scaling_factor 4.0, which then does not count
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "tied, no shared experts, odd heads": {
        **BASE,
        **GREEDY,
        "tie_word_embeddings": True,
        "n_shared_experts": None,
        "num_attention_heads": 5,  # 32 % 5 != 0
        "num_key_value_heads": 1,
        "hidden_act": "relu",
        "norm_topk_prob": True,
        "num_experts_per_tok": 1,  # one expert is scaled, not normalised
    },
    "every second layer": {
        **BASE,
        "moe_layer_freq": 2,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 3,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "three dense layers": {**BASE, "first_k_dense_replace": 3, "num_hidden_layers": 5},
    "all dense: no experts a token": {**BASE, "num_experts_per_tok": None, "hidden_act": "gelu_new"},
    "v3": V3,
    "moonlight": {
        **V3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000,
        "rope_scaling": None,
    },
    "kimi-k2": {**V3, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}
# One dense layer: rope is the same in all of them.
DENSE = {**BASE, "n_routed_experts": None, "num_hidden_layers": 1, "q_lora_rank": None}


def without(key: str) -> dict[str, Any]:
    return {"rope_scaling": {name: value for name, value in YARN.items() if name != key}}


ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_scaling": YARN},
    **{f"yarn without {key}": without(key) for key in YARN if key not in ("type", "factor")},
    "yarn, two amplitudes, ints": {"rope_scaling": {**YARN, "mscale": 2, "mscale_all_dim": 1}},
    "rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 4}},
    "rope_parameters": {"rope_scaling": None, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 500.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear, softmax factor": {"rope_scaling": {"type": "linear", "factor": 2.5, "mscale_all_dim": 0.707}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 12},
    "none": {"rope_scaling": None, "rope_theta": 700},
}

# Tokens a row: prefilled, prefilled as a second chunk, decoded.
FIRST, SECOND, STEPS = (11, 4), (3, 6), ((1, 1), (1, 3), (2, 1))
TABLE = np.array([[3, 1, 9, 5, 7], [2, 8, 4, 6, 10]], dtype=np.int32)  # pages of 4 tokens


@pytest.fixture
def check(tmp_path, reference, weights_of, save, float64_of, bundle_of):
    """Export this configuration (with these tensors) and compare every call's logits."""

    def compare(raw: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        tensors = weights_of(raw) if tensors is None else tensors
        checkpoint = save(tmp_path / "checkpoint", raw, {"model.safetensors": tensors}, index=False)
        session = OrtSession(bundle_of(checkpoint, dtype="float32", page_size=4), pages=12, threads=1)
        assert_equals_reference(session, reference, raw, float64_of(tensors))

    return compare


def assert_equals_reference(session: OrtSession, reference: Any, raw: dict[str, Any], weights: dict[str, Any]) -> None:
    """Ragged prefill, a second chunk, then decode steps, each against the whole sequence in float64."""
    total = [sum(new) for new in zip(FIRST, SECOND, *STEPS, strict=True)]
    ids = np.random.default_rng(1).integers(0, raw["vocab_size"], (2, max(total)))
    expected = []
    for row in range(2):
        cuts = np.cumsum([FIRST[row], SECOND[row], *[1] * sum(step[row] for step in STEPS)])
        lengths = np.array([cuts[cuts > s][0] for s in range(total[row])])
        expected.append(reference.logits(raw, weights, ids[row, : total[row]], lengths))
    past = np.zeros(2, np.int32)
    for call in (FIRST, SECOND, *STEPS):
        new = np.array(call, np.int32)
        padded = np.zeros((2, max(call)), np.int64)
        for row in range(2):
            padded[row, : new[row]] = ids[row, past[row] : past[row] + new[row]]
        if call in STEPS:
            found = session.decode(padded, new, past, TABLE)[[0, 1], new - 1]
        else:
            found = session.prefill(padded, new, past, TABLE)
        past = past + new
        for row in range(2):
            wanted = expected[row][past[row] - 1]
            error = np.abs(found[row] - wanted).max() / np.abs(wanted).max()
            assert error < RELATIVE, f"row {row} after {past[row]} tokens: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_model(check, name):
    check(MODELS[name])


@pytest.mark.parametrize("name", ROPES)
def test_rope(check, name):
    check({**DENSE, **ROPES[name]})


@pytest.mark.parametrize("name", [name for name in ROPES if name != "yarn"])
def test_ropes_differ_by_more_than_the_tolerance(reference, weights_of, float64_of, name):
    """Or the comparisons above would prove nothing."""
    weights, ids = float64_of(weights_of(DENSE)), np.arange(16)
    other = reference.logits({**DENSE, **ROPES[name]}, weights, ids)
    base = reference.logits({**DENSE, **ROPES["yarn"]}, weights, ids)
    assert np.abs(other - base).max() > 100 * RELATIVE * np.abs(base).max()


def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear weights in fp8 with a scale for each block of 128 x 128, as DeepSeek-V3 is published."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
            continue
        rows, columns = tensor.shape
        scales = torch.zeros(math.ceil(rows / 128), math.ceil(columns / 128))
        codes = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = tensor[at].abs().max() / 448
                codes[at] = (tensor[at] / scales[i, j]).to(torch.float8_e4m3fn)
        out[name], out[f"{name}_scale_inv"] = codes, scales
    return out


FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
# Every linear weight has more than one block in some direction, and none is a multiple of 128.
WIDE = {"hidden_size": 160, "intermediate_size": 136, "moe_intermediate_size": 132, "num_attention_heads": 8, **FP8}


FP8_BY_DEFAULT = ("v2", "v3", "moonlight")


@pytest.mark.parametrize(
    "name", [name if name in FP8_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_fp8_checkpoint(check, weights_of, name):
    raw = {**MODELS[name], **WIDE}
    check(raw, quantised(weights_of(raw)))


@pytest.mark.parametrize("by_reference", [False, True])
def test_bfloat16_model_keeps_its_correction_bias_in_float32(
    tmp_path, reference, weights_of, save, float64_of, bundle_of, by_reference
):
    """As V3 is published; ONNX Runtime computes the bfloat16 weights in float32, so that float32's tolerance holds."""
    raw = {**V3, "torch_dtype": "bfloat16"}
    tensors = {n: t if "correction_bias" in n else t.bfloat16() for n, t in weights_of(raw).items()}
    checkpoint = save(tmp_path / "checkpoint", raw, {"model.safetensors": tensors}, index=False)
    bundle = bundle_of(checkpoint, page_size=4, by_reference=by_reference)
    kinds = {w.recipe.name.rpartition(".")[2]: w.dtype for w in bundle.manifest.weights}
    assert (kinds["e_score_correction_bias"], kinds["gate_proj"]) == ("float32", "bfloat16")
    for session in (OrtSession(bundle, pages=12, threads=1), TorchSession(bundle, pages=12)):
        assert_equals_reference(session, reference, raw, float64_of(tensors))
    narrow = TorchSession(bundle, pages=12, dtype="bfloat16").model.state_dict()
    assert narrow["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
