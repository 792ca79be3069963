"""Every key inside rope_scaling or rope_parameters, and the rope types that read it.

null is as good as absent here, but for `factor` and `truncate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_trt.export.config.keys import UNCHANGED
from deepseek_trt.export.config.values import Anything, Flag, Integer, Kind, Number, Text, is_one_of, wrong_value
from deepseek_trt.export.text.wording import shown

ROPE_KINDS = ("default", "linear", "dynamic", "yarn")
_SCALED = ("linear", "dynamic", "yarn")
_YARN = ("yarn",)


@dataclass(frozen=True)
class RopeKey:
    """A key that rope types `types` read; others ignore it, which a note says. `neutral`: all but these are refused."""

    name: str
    why: str
    types: tuple[str, ...] = ROPE_KINDS
    kind: Kind = Anything()  # noqa: RUF009 - frozen
    neutral: tuple[Any, ...] = ()


ROPE_KEYS: dict[str, RopeKey] = {
    key.name: key
    for key in (
        RopeKey("rope_type", "default, linear, dynamic or yarn", kind=Text()),
        RopeKey("type", "the older spelling of rope_type; both must agree", kind=Text()),
        RopeKey("rope_theta", "comes before the rope_theta beside the settings", kind=Number(1.0, above=True)),
        RopeKey("factor", "how far the context is stretched", _SCALED, Number(0.0, above=True)),
        RopeKey("original_max_position_embeddings", "4096 where absent", _YARN, Integer(floats=True)),
        RopeKey("beta_fast", "32 where absent", _YARN, Number(0.0, above=True)),
        RopeKey("beta_slow", "1 where absent", _YARN, Number(0.0, above=True)),
        RopeKey("mscale", "cos and sin are multiplied by m(mscale) / m(mscale_all_dim)", _YARN, Number(0.0)),
        RopeKey("mscale_all_dim", "attention scores are multiplied by its m squared", _SCALED, Number(0.0)),
        RopeKey("attention_factor", "in place of m(mscale) / m(mscale_all_dim)", _YARN, Number(0.0, above=True)),
        RopeKey("truncate", "whether YaRN's ramp has whole ends", _YARN, Flag()),
        RopeKey("partial_rotary_factor", "only a part of the dimensions would be rotated", neutral=UNCHANGED),
        RopeKey("attn_factor", "vLLM multiplies cos and sin by it, transformers ignores it", neutral=UNCHANGED),
        RopeKey("extrapolation_factor", "YaRN's ramp would be scaled", neutral=UNCHANGED),
        RopeKey("alpha", "theta would be another one", neutral=UNCHANGED),
        RopeKey("apply_yarn_scaling", "the softmax factor would be left out", neutral=(None, True)),
        RopeKey("mrope_section", "positions would have several axes", neutral=(None, [])),
        RopeKey("mrope_interleaved", "positions would have several axes", neutral=(None, False)),
        RopeKey("full_attention", "settings for each type of layer are not supported", neutral=(None,)),
        RopeKey("sliding_attention", "settings for each type of layer are not supported", neutral=(None,)),
        RopeKey("low_freq_factor", "of rope type llama3, which is not supported", ()),
        RopeKey("high_freq_factor", "of rope type llama3, which is not supported", ()),
        RopeKey("short_factor", "of rope type longrope, which is not supported", ()),
        RopeKey("long_factor", "of rope type longrope, which is not supported", ()),
        RopeKey("short_mscale", "of rope type longrope, which is not supported", ()),
        RopeKey("long_mscale", "of rope type longrope, which is not supported", ()),
        RopeKey("finetuned", "of YaRN's first code, which reads it only to load a model", ()),
    )
}


def rope_settings(raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The settings that count and their key: rope_scaling, where that is not empty, as transformers chooses."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    return name, raw.get(name) or {}


def rope_kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def rope_faults(raw: dict[str, Any]) -> tuple[str, ...]:
    """One sentence for each setting that is wrong or not supported. Both dicts must be objects."""
    name, scaling = rope_settings(raw)
    found = []
    for key, value in scaling.items():
        known = ROPE_KEYS.get(key)
        if known is not None and known.neutral and not is_one_of(value, known.neutral):
            found.append(f"{name}.{key} {shown(value)} is not supported: {known.why}")
        elif known is not None and not _admits(known, value):
            found.append(wrong_value(f"{name}.{key}", value, known.kind))
    return (*found, *_wrong_kind(name, scaling))


def _admits(key: RopeKey, value: Any) -> bool:
    if value is None:
        return key.name != "truncate"  # which transformers reads as false
    return key.kind.admits(value)


def _wrong_kind(name: str, scaling: dict[str, Any]) -> list[str]:
    new, old, kind = scaling.get("rope_type"), scaling.get("type"), rope_kind(scaling)
    if new and old and new != old:
        return [f"{name} says rope_type {shown(new)} and type {shown(old)}: remove the one that is wrong"]
    if kind not in ROPE_KINDS:
        return [f"rope scaling {shown(kind)} is not supported; supported: {', '.join(ROPE_KINDS)}"]
    if kind != "default" and scaling.get("factor") is None:
        return [f"rope scaling {kind!r} needs a 'factor' in config.json's {name}"]
    return []


def rope_key_notes(raw: dict[str, Any]) -> tuple[str, ...]:
    """One sentence for each setting that is not read."""
    name, scaling = rope_settings(raw)
    kind, found = rope_kind(scaling), []
    for key, value in scaling.items():
        known = ROPE_KEYS.get(key)
        if value is None or value is False or (known is not None and kind in known.types):
            continue
        if known is None:
            found.append(
                f"config.json's key {name}.{shown(key)} is not known here: its value {shown(value)} is not read"
            )
        else:
            found.append(f"config.json's {name}.{key} {shown(value)} is not read: rope type {kind} does not use it")
    return tuple(found)
