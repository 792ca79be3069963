"""What is to be said of a config.json: what the graphs cannot express, and what is not read."""

from __future__ import annotations

from typing import Any

from deepseek_trt.export.config.agreement import UNTRUE, contradictions, oddities
from deepseek_trt.export.config.family import (
    ACTIVATIONS,
    DTYPES,
    MODEL_TYPES,
    TOPK_METHODS,
    activation_name,
    dtype_name,
    family_of,
    filled,
    is_v3_family,
    shape_of,
)
from deepseek_trt.export.config.keys import KEYS, NONE_OF_IT, Key
from deepseek_trt.export.config.quantization import quantization_notes, unsupported_quantization
from deepseek_trt.export.config.rope import rope_notes
from deepseek_trt.export.config.rope_keys import rope_faults
from deepseek_trt.export.config.shape import ModelShape
from deepseek_trt.export.config.values import is_one_of, nonfinite_in, wrong_value
from deepseek_trt.export.text.wording import shown

Raw = dict[str, Any]


def unsupported_features(raw: Raw) -> tuple[str, ...]:
    """One sentence for each thing in config.json that is wrong or cannot be expressed, naming key and value.

    Formats and other models come first: where config.json is of another model, nothing else is said of it.
    """
    wrong = {**_no_numbers(raw), **_wrong_values(raw)}
    raw = {key: value for key, value in raw.items() if key not in wrong}
    foreign = [*unsupported_quantization(raw.get("quantization_config") or {}), *_foreign(raw)]
    if "model_type" in wrong or family_of(raw) not in MODEL_TYPES:
        return (*foreign, *([wrong["model_type"]] if "model_type" in wrong else []))
    refused = [_refusal(KEYS[key], value) for key, value in raw.items() if _is_refused(KEYS.get(key), value)]
    found = [*foreign, *refused, *wrong.values(), *_no_latent_attention(raw), *rope_faults(raw), *_unknown_names(raw)]
    return tuple(found) or contradictions(raw, ModelShape(**shape_of(raw)))


def config_notes(raw: Raw) -> tuple[str, ...]:
    """One sentence for each thing in a supported config.json that is not read, or not read as others do."""
    unknown = [
        f"config.json's key {shown(key)} is not known here: its value {shown(value)} is not read"
        for key, value in raw.items()
        if key not in KEYS and not is_one_of(value, NONE_OF_IT)
    ]
    quantised = quantization_notes(raw.get("quantization_config") or {})
    return (*unknown, *rope_notes(filled(raw)), *quantised, *oddities(raw, ModelShape(**shape_of(raw))))


def _wrong_values(raw: Raw) -> dict[str, str]:
    """One sentence for each key that is read whose value is of another type, or out of range."""
    found = {}
    for name, value in raw.items():
        key = KEYS.get(name)
        if key is None or key.use not in ("used", "checked") or (value is None and key.null):
            continue
        if not key.kind.admits(value) and not (value is None and name in _LATENT_KEYS):
            found[name] = wrong_value(name, value, key.kind)
    return found


def _no_numbers(raw: Raw) -> dict[str, str]:
    """One sentence for each key whose value holds a NaN or an infinity, however deep, used or not: JSON has neither."""
    return {
        name: f"{found}, which is no number of JSON: mend it in config.json"
        for name, value in raw.items()
        if (found := nonfinite_in(name, value))
    }


def _is_refused(key: Key | None, value: Any) -> bool:
    return key is not None and key.use == "refused" and not is_one_of(value, key.neutral)


def _refusal(key: Key, value: Any) -> str:
    mend = "" if ";" in key.why else f"; {UNTRUE}"
    return f"{key.name} {shown(value)} is not supported: {key.why}{mend}"


def _foreign(raw: Raw) -> list[str]:
    found = _one_of("model_type", family_of(raw), MODEL_TYPES)
    if found and any(isinstance(raw.get(key), dict) for key in ("language_config", "vision_config", "text_config")):
        found.append("this is a vision-language model (nested config); only text models are supported")
    return found


_LATENT_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _no_latent_attention(raw: Raw) -> list[str]:
    found = []
    if raw.get("use_mla") is False:
        found.append("use_mla is false: this model has no latent attention; use a plain attention exporter")
    for key in _LATENT_KEYS:
        if key in raw and not raw[key]:
            found.append(
                f"{key} is {shown(raw[key])}: this is not a DeepSeek model with multi-head latent attention; "
                "use a plain attention exporter"
            )
    return found


def _unknown_names(raw: Raw) -> list[str]:
    found = _one_of("hidden_act", activation_name(raw), ACTIVATIONS) + _one_of("torch_dtype", dtype_name(raw), DTYPES)
    method = raw.get("topk_method") or ("noaux_tc" if is_v3_family(raw) else "greedy")
    methods = ("noaux_tc",) if is_v3_family(raw) else tuple(TOPK_METHODS)
    if method not in methods:
        return found + _one_of("topk_method", method, methods)
    scoring = raw.get("scoring_func") or TOPK_METHODS[method]
    if scoring != TOPK_METHODS[method]:
        wanted = TOPK_METHODS[method]
        found.append(f"scoring_func {scoring!r} with topk_method {method!r} is not supported; use {wanted!r}")
    return found


def _one_of(key: str, value: str, supported: tuple[str, ...]) -> list[str]:
    """The sentence that refuses `value`, or nothing."""
    return [] if value in supported else [f"{key} {shown(value)} is not supported; supported: {', '.join(supported)}"]
