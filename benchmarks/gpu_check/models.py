"""The models whose kernels are checked, as config.json spells them, and the plugin libraries made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "v2-lite": {
        **MLA,
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "topk_method": "greedy",
    },
    "v2": {
        **MLA,
        "hidden_size": 5120,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
    },
    "v3": {
        **MLA,
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
_VOCABULARY = 102400  # DeepSeek-V2's, where a config says none
# Model and dtype of each library that is compiled for the check; the demo's lie in its bundles.
LIBRARIES = (
    ("v2-lite", "bfloat16"),
    ("v2-lite", "float16"),
    ("v2-lite", "float32"),
    ("v2", "bfloat16"),
    ("v3", "bfloat16"),
)
DEMO_DTYPES = ("float32", "bfloat16")
# Of narrow weights: the demo's bundles by dtype and --quantize, and a library of the kernels of all formats at the
# sizes of a published model, whose fp8 matrices have multiples of so many columns (10,944 of a dense layer's down).
NARROW_DEMOS = (("bfloat16", "int4"), ("bfloat16", "fp8"))
NARROW_LIBRARIES = (("v2-lite", "bfloat16", 64),)


def raw_config(model: str) -> dict[str, Any]:
    """A config.json of the model; two layers, as their number changes no kernel."""
    return {"model_type": "deepseek_v2", "num_hidden_layers": 2, "vocab_size": _VOCABULARY, **MODELS[model]}


@dataclass(frozen=True)
class Sizes:
    """What the kernels' inputs are made of."""

    heads: int
    rank: int
    nope: int
    rope: int
    value: int
    hidden: int
    inter: int
    experts: int
    top_k: int
    groups: int
    topk_groups: int
    normalise: bool
    scale: float
    biased: bool
    shared: int
    vocab: int

    @property
    def width(self) -> int:
        """Numbers a cached token has in a layer."""
        return self.rank + self.rope

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Sizes:
        """From config.json's keys, read here and nowhere else in the check."""
        limited = raw["topk_method"] != "greedy"
        return cls(
            heads=raw["num_attention_heads"],
            rank=raw["kv_lora_rank"],
            nope=raw["qk_nope_head_dim"],
            rope=raw["qk_rope_head_dim"],
            value=raw["v_head_dim"],
            hidden=raw["hidden_size"],
            inter=raw["moe_intermediate_size"],
            experts=raw["n_routed_experts"],
            top_k=raw["num_experts_per_tok"],
            groups=raw["n_group"] if limited else 1,
            topk_groups=raw["topk_group"] if limited else 1,
            normalise=raw.get("norm_topk_prob", False),
            scale=raw.get("routed_scaling_factor", 1.0),
            biased=raw["topk_method"] == "noaux_tc",
            shared=raw.get("n_shared_experts") or 0,
            vocab=raw.get("vocab_size", _VOCABULARY),
        )
