"""Keys of config.json that must agree with each other, though only one of them is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepseek_trt.export.config.family import family_of, is_v3_family
from deepseek_trt.export.config.keys import ALIASES
from deepseek_trt.export.config.shape import ModelShape
from deepseek_trt.export.config.values import MAX_SIZE
from deepseek_trt.export.text.wording import shown

Raw = dict[str, Any]
_SIZES = {"hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
UNTRUE = "remove the key only if the weights were trained without it"


def contradictions(raw: Raw, shape: ModelShape) -> tuple[str, ...]:
    """One sentence for each pair of keys of which one must be wrong."""
    return tuple(sentence for rule in _CONTRADICTIONS if (sentence := rule(raw, shape)))


def oddities(raw: Raw, shape: ModelShape) -> tuple[str, ...]:
    """One sentence for each value that is not read and says something else than what is."""
    return tuple(sentence for rule in _ODDITIES if (sentence := rule(raw, shape)))


def _rotates_halves(raw: Raw, shape: ModelShape) -> str | None:
    if shape.rope_interleave or is_v3_family(raw):
        return None
    return (
        "rope_interleave is false, which deepseek_v2 does not have (transformers ignores it): use the model_type that "
        "the weights were made for, or remove the key"
    )


def _two_names(raw: Raw, shape: ModelShape) -> str | None:
    for alias, name in ALIASES.items():
        if raw.get(alias) is not None and name in raw and raw[name] is not None and raw[alias] != raw[name]:
            return f"{alias} is {raw[alias]} and {name} is {raw[name]}, which are one thing: remove the wrong one"
    return None


def _head_dim(raw: Raw, shape: ModelShape) -> str | None:
    if not raw.keys() >= _SIZES:  # the tensors decide what the widths are
        return None
    widths = {shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.qk_head_dim, shape.v_head_dim}
    widths.add(shape.hidden_size // shape.num_attention_heads)
    if raw.get("head_dim") in (None, *widths):
        return None
    return f"head_dim is {raw['head_dim']}, which is no width of this model's heads {sorted(widths)}: remove the key"


def _qk_head_dim(raw: Raw, shape: ModelShape) -> str | None:
    if raw.get("qk_head_dim") in (None, shape.qk_head_dim) or not raw.keys() >= _SIZES:
        return None
    whole = shape.qk_head_dim
    return (
        f"qk_head_dim is {raw['qk_head_dim']}, but qk_nope_head_dim + qk_rope_head_dim is {whole}: remove the wrong one"
    )


def _yarn_context(raw: Raw, shape: ModelShape) -> str | None:
    written, inside = raw.get("original_max_position_embeddings"), shape.rope.original_max_position_embeddings
    if shape.rope.kind != "yarn" or written in (None, inside):
        return None
    return (
        f"original_max_position_embeddings is {written}, but {inside} in the rope settings, and readers of config.json "
        "do not agree on which counts: remove the wrong one"
    )


def _windows(raw: Raw, shape: ModelShape) -> str | None:
    if raw.get("sliding_window") and raw.get("use_sliding_window") is not False:
        return f"sliding_window {shown(raw['sliding_window'])} is not supported: all tokens are seen; {UNTRUE}"
    types = raw.get("layer_types")
    if types and (not isinstance(types, list) or any(kind not in ("full_attention", "attention") for kind in types)):
        return f"layer_types {shown(types)} is not supported: every layer must be full_attention; {UNTRUE}"
    return None


def _dense_layers(raw: Raw, shape: ModelShape) -> str | None:
    types, count = raw.get("mlp_layer_types"), shape.num_hidden_layers
    made = ["sparse" if shape.is_moe_layer(i) else "dense" for i in range(count)]
    if not types or types == made or not {"num_hidden_layers", "first_k_dense_replace"} <= raw.keys():
        return None
    first = shape.first_k_dense_replace
    return f"mlp_layer_types {shown(types)} contradicts first_k_dense_replace {first}: remove the wrong one"


def _products(raw: Raw, shape: ModelShape) -> str | None:
    heads, nope, value = shape.num_attention_heads, shape.qk_nope_head_dim, shape.v_head_dim
    rows = {
        "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)": heads * shape.qk_head_dim,
        "num_attention_heads * (qk_nope_head_dim + v_head_dim)": heads * (nope + value),
        "kv_lora_rank + qk_rope_head_dim": shape.latent_dim,
        "n_shared_experts * moe_intermediate_size": shape.n_shared_experts * shape.moe_intermediate_size,
    }
    for name, size in rows.items():
        if size > MAX_SIZE:
            return f"{name} is {size}, above {MAX_SIZE}, the most rows of a tensor: mend config.json"
    return None


_CONTRADICTIONS: tuple[Callable[[Raw, ModelShape], str | None], ...] = (
    _two_names,
    _rotates_halves,
    _products,
    _head_dim,
    _qk_head_dim,
    _yarn_context,
    _windows,
    _dense_layers,
)


def _other_head_count(raw: Raw, shape: ModelShape) -> str | None:
    written, heads = raw.get("num_key_value_heads"), shape.num_attention_heads
    if written in (None, heads) or "num_attention_heads" not in raw:
        return None
    return f"num_key_value_heads {written} is not read: every one of the {heads} heads has its key in kv_b_proj"


def _family_by_class(raw: Raw, shape: ModelShape) -> str | None:
    classes = raw.get("architectures") or []
    if not raw.get("model_type"):
        return f"config.json lacks model_type: it is read as {family_of(raw)}"
    other = "DeepseekV2" if is_v3_family(raw) else "DeepseekV3"
    if not any(name.startswith(other) for name in classes):
        return None
    return f"architectures names {shown(classes[0])}, model_type is {raw['model_type']}: model_type counts"


def _outside_the_vocabulary(raw: Raw, shape: ModelShape) -> str | None:
    given: dict[str, tuple[int | None, ...]] = {
        "bos_token_id": (shape.bos_token_id,),
        "eos_token_id": shape.eos_token_ids,
    }
    for key, ids in given.items():
        outside = [i for i in ids if i is not None and i >= shape.vocab_size]
        if outside and {key, "vocab_size"} <= raw.keys():
            return f"{key} {outside[0]} is outside the vocabulary of {shape.vocab_size}"
    return None


_ODDITIES: tuple[Callable[[Raw, ModelShape], str | None], ...] = (
    _other_head_count,
    _family_by_class,
    _outside_the_vocabulary,
)
