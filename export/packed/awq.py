"""AWQ's settings (AutoAWQ's gemm, transformers' AwqConfig): codes of a row in one integer, 4 bits, zero points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_trt.export.config.values import Integer, ListOf, Text
from deepseek_trt.export.packed.patterns import Pattern
from deepseek_trt.export.packed.settings import (
    PackedSettings,
    Scheme,
    Setting,
    faults,
    faults_of_group,
    group_of,
    harmless,
    unknown,
)

LABEL = "AWQ"
_AT = "quantization_config"
_GEMM = "other versions pack codes in other orders"
KEYS = (
    Setting("quant_method", "awq", Text()),
    Setting("bits", "used", Integer(), (4,)),
    Setting("w_bit", "used as bits, with which it must agree", Integer(), (4,)),
    Setting("group_size", "used: 128 where absent, -1 is a row", Integer(low=-1)),
    Setting("q_group_size", "used as group_size, with which it must agree", Integer(low=-1)),
    Setting("version", _GEMM, only=("gemm", "GEMM")),
    Setting("format", _GEMM, only=("gemm", "GEMM")),
    Setting("checkpoint_format", _GEMM, only=("gemm", "GEMM")),
    Setting("zero_point", "codes are read with their zero points", only=(True,)),
    Setting("backend", "llm-awq packs codes in another order", only=("autoawq", "auto")),
    Setting("modules_to_not_convert", "used: parts of the names of modules that are whole", ListOf(Text())),
    *harmless("how layers are put together when it is run", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
    *harmless("which kernel runs it", "exllama_config"),
)


def awq_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from faults(_AT, settings, KEYS, LABEL)
    if settings.get("bits") is None and settings.get("w_bit") is None:
        yield f"{_AT}.bits is missing: AWQ is read with 4 bits; download config.json again"
    sizes = {key: settings[key] for key in ("group_size", "q_group_size") if Integer(low=-1).admits(settings.get(key))}
    for key, size in sizes.items():
        yield from faults_of_group(f"{_AT}.{key}", size, LABEL)
    if len(set(sizes.values())) > 1:
        yield f"{_AT}: group_size and q_group_size contradict each other; download config.json again"


def awq_notes(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from unknown(_AT, settings, KEYS)


def awq_settings(settings: Mapping[str, Any]) -> PackedSettings:
    """Of settings without faults."""
    sizes = [settings[key] for key in ("group_size", "q_group_size") if settings.get(key) is not None]
    group = group_of(sizes[0] if sizes else 128)
    scheme = Scheme("awq", "qweight", 4, group, symmetric=False, targets=(Pattern("linear in layers"),))
    whole = tuple(Pattern("part", name) for name in settings.get("modules_to_not_convert") or ())
    return PackedSettings(LABEL, (scheme,), whole, "modules_to_not_convert")
