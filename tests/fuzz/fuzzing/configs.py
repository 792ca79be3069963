"""What transformers' config class makes of a config.json, beside what was read."""

from __future__ import annotations

import math
from typing import Any

from fuzzing.runner import DisagreementError

# Ours: theirs, and why they may differ where they do.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "n_shared_experts": "n_shared_experts",
    "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
    "first_k_dense_replace": "first_k_dense_replace",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
    "topk_method": "topk_method",
}
# What transformers' classes refuse and is right here, and why.
REFUSED_BY_TRANSFORMERS_ALONE = {
    "expected float, got int": "a whole number is a number: the published model code multiplies by it",
    "is not a multiple of the number of attention heads": "latent attention's heads have widths of their own",
}
_ROPE = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale_all_dim", "attention_factor")


def judge_config(raw: dict[str, Any], source: Any) -> None:
    """Compare every value that config.json writes down; what it leaves out is decided by the tensors."""
    from transformers import DeepseekV2Config, DeepseekV3Config

    v3 = raw.get("model_type") in ("deepseek_v3", "kimi_k2") or (
        not raw.get("model_type") and any("V3" in name for name in raw.get("architectures") or ())
    )
    config = source.config
    decided = {ours: getattr(config, ours) for ours in _FIELDS if ours not in raw}  # by the tensors
    try:
        theirs = (DeepseekV3Config if v3 else DeepseekV2Config).from_dict({**decided, **raw})
    except Exception as error:
        words = " ".join(str(error).split())
        if any(known in words for known in REFUSED_BY_TRANSFORMERS_ALONE):
            return
        raise DisagreementError(f"transformers refuses config.json: {words[:500]}") from None
    for ours, name in _FIELDS.items():
        if raw.get(ours) is None or not hasattr(theirs, name):
            continue
        found, wanted = getattr(config, ours), getattr(theirs, name)
        if found != wanted:
            raise DisagreementError(f"{ours} {found!r} was read, transformers reads {wanted!r}")
    _judge_rope(config, theirs)
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    if raw.get("eos_token_id") is not None and set(ends) != set(config.eos_token_ids):
        raise DisagreementError(f"answers end with {config.eos_token_ids}, transformers' with {ends}")
    if source.classifier is not None and raw.get("id2label"):
        wanted = tuple(theirs.id2label[i] for i in range(len(theirs.id2label)))
        if source.classifier.labels != wanted:
            raise DisagreementError(f"labels {source.classifier.labels} were read, transformers reads {wanted}")


def _judge_rope(config: Any, theirs: Any) -> None:
    settings = dict(getattr(theirs, "rope_parameters", None) or {})
    kind = settings.get("rope_type", "default")
    if config.rope.kind != kind:
        raise DisagreementError(f"rope type {config.rope.kind} was read, transformers reads {kind}")
    if not math.isclose(config.rope.theta, settings.get("rope_theta", 10000.0), rel_tol=1e-12):
        raise DisagreementError(
            f"rope_theta {config.rope.theta} was read, transformers reads {settings.get('rope_theta')}"
        )
    for name in _ROPE if kind == "yarn" else ():
        found, wanted = getattr(config.rope, name), settings.get(name)
        absent = name == "original_max_position_embeddings" and found == 4096  # by the published model code
        if wanted is not None and found != wanted and not absent:
            raise DisagreementError(f"{name} {found!r} was read, transformers reads {wanted!r}")
