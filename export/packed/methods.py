"""Methods whose packed weights are read, by their quant_method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_trt.export.packed import awq, compressed, gptq
from deepseek_trt.export.packed.settings import PackedSettings, Setting


@dataclass(frozen=True)
class Method:
    """`faults` and `notes` give sentences; `read` is of settings without faults. `keys` are tables by their place."""

    label: str
    keys: Mapping[str, tuple[Setting, ...]]
    faults: Callable[[Mapping[str, Any]], Iterator[str]]
    notes: Callable[[Mapping[str, Any]], Iterator[str]]
    read: Callable[[Mapping[str, Any]], PackedSettings]


METHODS = {
    "compressed-tensors": Method(
        compressed.LABEL,
        {
            "": compressed.KEYS,
            "config_groups.*": compressed.SCHEME_KEYS,
            "config_groups.*.weights": compressed.WEIGHT_KEYS,
        },
        compressed.compressed_faults,
        compressed.compressed_notes,
        compressed.compressed_settings,
    ),
    "gptq": Method(gptq.LABEL, {"": gptq.KEYS}, gptq.gptq_faults, gptq.gptq_notes, gptq.gptq_settings),
    "awq": Method(awq.LABEL, {"": awq.KEYS}, awq.awq_faults, awq.awq_notes, awq.awq_settings),
}


def method_of(settings: Mapping[str, Any]) -> Method | None:
    """The method that the settings name, where it is one of these."""
    name = settings.get("quant_method")
    return METHODS.get(name) if isinstance(name, str) else None


def packed_settings(raw: Mapping[str, Any]) -> PackedSettings | None:
    """What a config.json without faults says of packed weights; None where it says nothing of such."""
    settings = raw.get("quantization_config") or {}
    method = method_of(settings)
    return method.read(settings) if method else None
