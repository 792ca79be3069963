"""compressed-tensors' settings: groups of modules, each with its scheme; weights of whole numbers alone are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_trt.export.config.values import Flag, Integer, ListOf, Object, Text
from deepseek_trt.export.packed.patterns import REGEX, Pattern
from deepseek_trt.export.packed.settings import (
    ABSENT,
    ADVICE,
    PackedSettings,
    Scheme,
    Setting,
    faults,
    faults_of_group,
    faults_of_pattern,
    group_of,
    harmless,
    unknown,
)
from deepseek_trt.export.text.wording import shown

LABEL = "compressed-tensors"
_AT = "quantization_config"
_AGAIN = "download config.json again"
_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_PLAIN = ("int-quantized", "naive-quantized")  # a code in each byte
_FORMATS = (_PACKED, *_PLAIN)
KEYS = (
    Setting("quant_method", "compressed-tensors", Text()),
    Setting("config_groups", "used: each group's targets are packed as its weights say", Object(Object())),
    Setting("format", "used: how codes lie in the tensors", Text(), (*_FORMATS, _MIXED)),
    Setting("ignore", "used: names, patterns (re:) or classes of modules that are whole", ListOf(Text())),
    Setting("quantization_status", "the tensors would hold no codes", Text(), ("compressed",)),
    Setting("kv_cache_scheme", "keys and values would be rounded", only=ABSENT),
    Setting("sparsity_config", "checked: its format must be dense", Object()),
    Setting("transform_config", "activations would be turned before they are multiplied", only=ABSENT),
    *harmless("how it was made", "global_compression_ratio", "version", "moe_sparsity_config"),
    *harmless("weights are taken as they are", "run_compressed"),
)
SCHEME_KEYS = (
    Setting("targets", "used: names, patterns (re:) or the class Linear", ListOf(Text())),
    Setting("weights", "used", Object()),
    Setting("format", "used before the format of all groups", Text(), _FORMATS),
    Setting("input_activations", "activations would be rounded", only=ABSENT),
    Setting("output_activations", "activations would be rounded", only=ABSENT),
)
WEIGHT_KEYS = (
    Setting("num_bits", "used", Integer(), (4, 8)),
    Setting("type", "codes are whole numbers", Text(), ("int",)),
    Setting("symmetric", "used: true where absent; without zero points", Flag()),
    Setting("group_size", "used", Integer(low=-1)),
    Setting("strategy", "scales are of groups or of rows (channel)", Text(), ("group", "channel")),
    Setting(
        "actorder",
        "used: of group and dynamic, weight_g_idx is looked at",
        only=(False, "weight", "static", "group", "dynamic"),
    ),
    Setting("dynamic", "weights have their scales beside them", only=ABSENT),
    Setting("block_structure", "scales are of groups or of rows (channel)", only=ABSENT),
    *harmless("how the codes were found", "observer", "observer_kwargs"),
    *harmless("each tensor's dtype says it", "scale_dtype", "zp_dtype"),
)


def compressed_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from faults(_AT, settings, KEYS, LABEL)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not Object(Object()).admits(groups):
        if groups is None:
            yield f"{_AT}.config_groups is missing: weights are packed by its groups; {_AGAIN}"
        return
    if not groups:
        yield f"{_AT}.config_groups is empty: weights are packed by its groups; {_AGAIN}"
    for name, group in groups.items():
        yield from _faults_of_scheme(f"{_AT}.config_groups.{shown(name)[1:-1]}", group, settings)
    yield from _faults_of_patterns(f"{_AT}.ignore", settings.get("ignore"))
    sparse = settings.get("sparsity_config") or {}
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        yield (
            f"{_AT}.sparsity_config.format {shown(sparse['format'])} is not supported: weights would be stored with "
            f"zeros left out; {ADVICE}"
        )


def _faults_of_scheme(at: str, group: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    yield from faults(at, group, SCHEME_KEYS, LABEL)
    yield from _faults_of_patterns(f"{at}.targets", group.get("targets"))
    weights = group.get("weights")
    if not group.get("targets") or not weights:
        lacks = "targets" if not group.get("targets") else "weights"
        yield f"{at} has no {lacks}: compressed-tensors is read with both; {_AGAIN}"
    if not isinstance(weights, dict):
        return
    at = f"{at}.weights"
    yield from faults(at, weights, WEIGHT_KEYS, LABEL)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if not (size is None or Integer(low=-1).admits(size)):
        return
    if (strategy == "group") != (size is not None and size > 0) and strategy in ("group", "channel"):
        yield f"{at}: strategy {strategy} and group_size {shown(size)} contradict each other; {_AGAIN}"
    elif strategy is None and size is None:
        yield f"{at}: without strategy and group_size one scale is a tensor's, which is not supported; {ADVICE}"
    yield from faults_of_group(f"{at}.group_size", size, LABEL)
    form, bits = group.get("format") or settings.get("format"), weights.get("num_bits") or 8
    if form is None or form == _MIXED:
        yield f"{at}: no format says how codes lie in the tensors; {_AGAIN}"
    elif form in _PLAIN and bits == 4:
        yield f"{at}.num_bits 4 is not supported in format {form}: {_PACKED} is read with 4 bits; {ADVICE}"


def _faults_of_patterns(at: str, value: Any) -> Iterator[str]:
    for index, text in enumerate(value if ListOf(Text()).admits(value) else ()):
        if text.startswith(REGEX):
            yield from faults_of_pattern(f"{at}[{index}]", text.removeprefix(REGEX))


def compressed_notes(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from unknown(_AT, settings, KEYS)
    for name, group in settings["config_groups"].items():
        at = f"{_AT}.config_groups.{shown(name)[1:-1]}"
        yield from unknown(at, group, SCHEME_KEYS)
        yield from unknown(f"{at}.weights", group["weights"], WEIGHT_KEYS)


def compressed_settings(settings: Mapping[str, Any]) -> PackedSettings:
    """Of settings without faults."""
    schemes = tuple(_scheme(group, settings) for group in settings["config_groups"].values())
    return PackedSettings(LABEL, schemes, tuple(map(Pattern.of, settings.get("ignore") or ())), "ignore")


def _scheme(group: Mapping[str, Any], settings: Mapping[str, Any]) -> Scheme:
    weights, form = group["weights"], group.get("format") or settings["format"]
    return Scheme(
        layout="rows",
        stored="weight_packed" if form == _PACKED else "weight",
        bits=weights.get("num_bits") or 8,
        group=group_of(weights.get("group_size")),
        symmetric=weights.get("symmetric") is not False,
        targets=tuple(map(Pattern.of, group["targets"])),
        ordered=weights.get("actorder") in ("group", "dynamic"),
    )
