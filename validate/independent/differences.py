"""Config keys that transformers does not compute as the original model: of such a checkpoint it proves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_YARN_AMPLITUDES = ("mscale", "mscale_all_dim")


def known_differences(raw: dict[str, Any]) -> tuple[str, ...]:
    """KEY=VALUE of every key of a config.json that transformers 5.15 to 5.24 leaves out or takes otherwise."""
    return tuple(f"{key}={value!r}" for key, value in _differences(raw))


def _differences(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    is_v2 = raw.get("model_type", "deepseek_v2") == "deepseek_v2"
    if is_v2 and raw.get("norm_topk_prob") and (raw.get("num_experts_per_tok") or 0) > 1:
        yield "norm_topk_prob", raw["norm_topk_prob"]
    if raw.get("moe_layer_freq") not in (None, 1):
        yield "moe_layer_freq", raw["moe_layer_freq"]
    if not is_v2 and raw.get("topk_method") not in (None, "noaux_tc"):
        yield "topk_method", raw["topk_method"]
    if raw.get("scoring_func") not in (None, "softmax" if is_v2 else "sigmoid"):
        yield "scoring_func", raw["scoring_func"]
    for name in ("rope_scaling", "rope_parameters"):
        settings = raw.get(name)
        if isinstance(settings, dict) and "yarn" in (settings.get("type"), settings.get("rope_type")):
            yield from _yarn(name, settings)


def _yarn(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if settings.get("original_max_position_embeddings") is None:
        yield f"{name}.original_max_position_embeddings", None
    given = [key for key in _YARN_AMPLITUDES if settings.get(key)]
    if len(given) == 1 or any(settings.get(key) == 0 for key in _YARN_AMPLITUDES):
        for key in _YARN_AMPLITUDES:
            yield f"{name}.{key}", settings.get(key)
