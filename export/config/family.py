"""The families of models: their names, and what a key that config.json lacks means in each."""

from __future__ import annotations

import dataclasses
from typing import Any

from deepseek_trt.export.config.keys import ALIASES
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.config.shape import ModelShape

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# How experts are chosen, and the only scoring function that each is defined with.
TOPK_METHODS = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# Other names of the same functions.
_ACTIVATION_NAMES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
DTYPES = ("float32", "float16", "bfloat16")

# What an absent key means in the V3 family, where it differs from V2 (ModelShape's defaults).
V3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# What null means where it does not mean that the key is absent.
_NULLS: dict[str, Any] = {
    "q_lora_rank": None,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_experts_per_tok": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def family_of(raw: dict[str, Any]) -> str:
    """config.json's model_type; where that is absent, that of its class, or else deepseek_v2."""
    if raw.get("model_type"):
        return str(raw["model_type"])
    classes = raw.get("architectures") or ()
    return "deepseek_v3" if any(name.startswith("DeepseekV3") for name in classes) else "deepseek_v2"


def is_v3_family(raw: dict[str, Any]) -> bool:
    return family_of(raw) in ("deepseek_v3", "kimi_k2")


def filled(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the V3 family's values for what is absent, and nulls and second names as what they mean."""
    given = {key: _NULLS.get(key) if value is None else value for key, value in raw.items()}
    given = {key: value for key, value in given.items() if value is not None or key in _NULLS}
    renamed = {ALIASES[key]: value for key, value in given.items() if key in ALIASES}
    return {**(V3_DEFAULTS if is_v3_family(raw) else {}), **given, **renamed}


def shape_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelShape that a config.json without faults gives; the others are absent."""
    raw = filled(raw)
    names = {f.name for f in dataclasses.fields(ModelShape)} & raw.keys()
    ends = raw.get("eos_token_id", ModelShape.eos_token_ids)
    return {
        **{name: raw[name] for name in names},
        "hidden_act": activation_name(raw),
        "rope": RopeConfig.from_hf(raw),
        "eos_token_ids": tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,),
        "dtype": dtype_name(raw),
    }


def activation_name(raw: dict[str, Any]) -> str:
    name = "silu" if raw.get("hidden_act") is None else raw["hidden_act"]
    return str(_ACTIVATION_NAMES.get(name, name))


def dtype_name(raw: dict[str, Any]) -> str:
    """The dtype by its name; dtype comes before torch_dtype, as in transformers."""
    given = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None]
    return str(given[0] if given else "float32").removeprefix("torch.")
