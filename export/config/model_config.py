"""ModelConfig: what config.json says, translated once into one spelling.

The meaning of each key, and its default when config.json lacks it, is the original DeepSeek-V2 model's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_trt.export.config.rope import DEFAULT_MAX_POSITIONS, ROPE_KINDS, RopeConfig, rope_kind, rope_settings
from deepseek_trt.export.errors import ConfigError

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# How experts are chosen, and the only scoring function that each is defined with.
TOPK_METHODS = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# Other names of the same functions.
_ACTIVATION_NAMES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
DTYPES = ("float32", "float16", "bfloat16")
FP8_BLOCK = 128  # rows and columns that share a scale in fp8 checkpoints

# What a key that config.json lacks means in the V3 family, where it differs from V2.
_V3_DEFAULTS: dict[str, Any] = {
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


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a DeepSeek-V2 model that shapes its graphs. Defaults are those of an absent key."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = DEFAULT_MAX_POSITIONS
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # MLA
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig = field(default_factory=RopeConfig)
    # MoE; n_routed_experts == 0 means that every layer is dense
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 1407
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    topk_method: str = "greedy"  # its scoring function: TOPK_METHODS
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    # text
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    dtype: str = "float32"

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or expanded key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the normalised latent, then the rotated rope part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores, YaRN's amplitude included."""
        return self.rope.softmax_amplitude / math.sqrt(self.qk_head_dim)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` routes to experts."""
        sparse = self.n_routed_experts > 0 and self.num_experts_per_tok > 0
        return sparse and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def biased_routing(self) -> bool:
        """Whether a learned bias takes part in the choice of experts (V3 family)."""
        return self.topk_method == "noaux_tc"

    @property
    def routing_groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may choose from; (1, 1) where routing is not limited."""
        return (1, 1) if self.topk_method == "greedy" else (self.n_group, self.topk_group)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Translate a config.json of transformers or of the original model code, whatever its spelling.

        Raises ConfigError naming the key, its value and what is supported.
        """
        refusals = unsupported_features(raw)
        if refusals:
            raise ConfigError(refusals[0])
        family = _V3_DEFAULTS if _is_v3_family(raw) else {}
        raw = {**family, **raw}
        names = {f.name for f in dataclasses.fields(cls)} & raw.keys()
        # null means absent everywhere except where it means "none of this" (handled below)
        values = {name: raw[name] for name in names if raw[name] is not None}
        for key in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"):
            if key in raw and raw[key] is None:
                values[key] = 1 if "group" in key else 0
        if raw.get("q_lora_rank", 1) is None:
            values["q_lora_rank"] = None
        values["hidden_act"] = _activation(raw)
        values["rope"] = RopeConfig.from_hf(raw)
        values["eos_token_ids"] = _as_tuple(raw.get("eos_token_id", 2))
        values["dtype"] = _dtype(raw)
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        """Refuse values that contradict each other."""
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: pairs are rotated, so it must be even")
        if self.rope.kind == "dynamic" and self.qk_rope_head_dim == 2:
            raise ConfigError("rope scaling 'dynamic' is not defined for qk_rope_head_dim 2")
        if not self.n_routed_experts or not self.num_experts_per_tok:
            return
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} > n_routed_experts {self.n_routed_experts}"
            )
        if self.topk_method != "greedy":
            self._check_groups()

    def _check_groups(self) -> None:
        experts = self.n_routed_experts
        if experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"n_group {self.n_group} must divide n_routed_experts {experts}, "
                f"and topk_group {self.topk_group} must lie between 1 and n_group"
            )
        size = experts // self.n_group
        if self.topk_group * size < self.num_experts_per_tok:
            raise ConfigError(
                f"topk_group {self.topk_group} groups hold fewer experts than num_experts_per_tok "
                f"{self.num_experts_per_tok}"
            )
        if self.topk_method == "noaux_tc" and self.topk_group < self.n_group and size < 2:
            raise ConfigError(f"n_group {self.n_group}: noaux_tc scores a group by its two best experts, it has {size}")


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is; ConfigError when there is none, or when it is not a JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: give a folder with config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold an object; download it again")
    return raw


def unsupported_features(raw: dict[str, Any]) -> tuple[str, ...]:
    """One sentence for each thing in config.json that the graphs cannot express, naming key and value."""
    found = _one_of("model_type", _model_type(raw), MODEL_TYPES)
    if any(isinstance(raw.get(key), dict) for key in ("language_config", "vision_config", "text_config")):
        found.append("this is a vision-language model (nested config); only text models are supported")
    if raw.get("use_mla") is False:
        found.append("use_mla is false: this model has no latent attention; use a plain attention exporter")
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if key in raw and not raw[key]:
            found.append(f"{key} is {raw[key]!r}: this is not a DeepSeek model with multi-head latent attention")
    found += _one_of("rope scaling", rope_kind(rope_settings(raw)), ROPE_KINDS)
    found += _one_of("hidden_act", _activation(raw), ACTIVATIONS)
    found += _one_of("torch_dtype", _dtype(raw), DTYPES)
    return (*found, *_unsupported_router(raw), *_unsupported_quantization(raw))


def _unsupported_router(raw: dict[str, Any]) -> list[str]:
    method = raw.get("topk_method") or ("noaux_tc" if _is_v3_family(raw) else "greedy")
    unknown = _one_of("topk_method", method, tuple(TOPK_METHODS))
    if unknown:
        return unknown
    scoring = raw.get("scoring_func") or TOPK_METHODS[method]
    if scoring == TOPK_METHODS[method]:
        return []
    return [f"scoring_func {scoring!r} with topk_method {method!r} is not supported; use {TOPK_METHODS[method]!r}"]


def _unsupported_quantization(raw: dict[str, Any]) -> list[str]:
    """Only fp8 with one scale for each block of 128 x 128 weights can be read."""
    settings = raw.get("quantization_config")
    if not settings:
        return []
    method, block = settings.get("quant_method", "unknown"), settings.get("weight_block_size")
    if method != "fp8":
        return [f"quantized checkpoints ({method}) are not supported; use the bfloat16 checkpoint"]
    if settings.get("fmt", "e4m3") != "e4m3":
        return [f"fp8 format {settings['fmt']!r} is not supported; use e4m3, or the bfloat16 checkpoint"]
    if block != [FP8_BLOCK, FP8_BLOCK]:
        return [f"fp8 weight_block_size {block} is not supported; use [{FP8_BLOCK}, {FP8_BLOCK}]"]
    return []


def _model_type(raw: dict[str, Any]) -> str:
    return str(raw.get("model_type", "deepseek_v2"))


def _is_v3_family(raw: dict[str, Any]) -> bool:
    return _model_type(raw) in ("deepseek_v3", "kimi_k2")


def _activation(raw: dict[str, Any]) -> str:
    name = raw.get("hidden_act") or "silu"
    return _ACTIVATION_NAMES.get(name, name)


def _dtype(raw: dict[str, Any]) -> str:
    return str(raw.get("torch_dtype") or raw.get("dtype") or "float32").removeprefix("torch.")


def _one_of(key: str, value: str, supported: tuple[str, ...]) -> list[str]:
    """The sentence that refuses `value`, or nothing."""
    return [] if value in supported else [f"{key} {value!r} is not supported; supported: {', '.join(supported)}"]


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
