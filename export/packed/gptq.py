"""GPTQ's settings (AutoGPTQ, GPTQModel, transformers' GPTQConfig): codes of a column in one integer, zeros less one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_trt.export.config.values import Flag, Integer, ListOf, Object, Text
from deepseek_trt.export.packed.patterns import Pattern
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

LABEL = "GPTQ"
_AT = "quantization_config"
_FORMATS = ("gptq", "gptq_v2")
_WHOLE = "-:"  # before patterns of `dynamic`: modules that are not packed
KEYS = (
    Setting("quant_method", "gptq", Text()),
    Setting("bits", "used", Integer(), (4, 8)),
    Setting("group_size", "used: 128 where absent, -1 is a row", Integer(low=-1)),
    Setting("sym", "used: true where absent; every zero point is then half of what a code can be", Flag()),
    Setting("desc_act", "used: g_idx is looked at before anything is written", Flag()),
    Setting(
        "checkpoint_format", "used: zero points are stored less one in gptq, as they are in gptq_v2", Text(), _FORMATS
    ),
    Setting("format", "used as checkpoint_format, with which it must agree", Text(), _FORMATS),
    Setting("is_marlin_format", "another layout of the codes", only=ABSENT),
    Setting("pack_dtype", "codes lie in integers of 32 bits", only=("int32",)),
    Setting("dynamic", "used: patterns with -: name modules that are whole; others are refused", Object()),
    Setting(
        "modules_in_block_to_quantize", "used: what else is in a layer is whole", ListOf(ListOf(Text(), or_one=True))
    ),
    Setting("adapter", "what is learned beside the weights would be left out", only=ABSENT),
    *harmless("the tensors say it", "lm_head", "static_groups"),
    *harmless(
        "how the codes were found",
        *(
            "dataset",
            "damp_percent",
            "damp_auto_increment",
            "true_sequential",
            "act_group_aware",
            "mse",
            "model_seqlen",
        ),
        *("block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "tokenizer"),
        *("cache_block_outputs", "meta", "hyb_act", "failsafe", "gptaq", "foem", "rotation", "offload_to_disk"),
    ),
    *harmless(
        "which kernel runs it", "use_exllama", "exllama_config", "disable_exllama", "max_input_length", "backend"
    ),
    *harmless("which kernel runs it", "use_cuda_fp16"),
    *harmless("where it comes from", "model_name_or_path", "model_file_base_name"),
)


def gptq_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from faults(_AT, settings, KEYS, LABEL)
    if settings.get("bits") is None:
        yield f"{_AT}.bits is missing: GPTQ is read with 4 or 8 bits; download config.json again"
    size = settings.get("group_size")
    if Integer(low=-1).admits(size):
        yield from faults_of_group(f"{_AT}.group_size", size, LABEL)
    kinds = {settings[key] for key in ("checkpoint_format", "format") if settings.get(key) in _FORMATS}
    if len(kinds) > 1:
        yield f"{_AT}: checkpoint_format and format contradict each other; download config.json again"
    dynamic = settings.get("dynamic")
    for pattern in dynamic if isinstance(dynamic, dict) else ():
        if pattern.startswith(_WHOLE):
            yield from faults_of_pattern(f"{_AT}.dynamic", pattern.removeprefix(_WHOLE))
        else:
            yield (
                f"{_AT}.dynamic {shown(pattern)} is not supported: modules would be packed in another way; only "
                f"patterns that begin with {_WHOLE} are, of modules that are whole; {ADVICE}"
            )


def gptq_notes(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from unknown(_AT, settings, KEYS)


def gptq_settings(settings: Mapping[str, Any]) -> PackedSettings:
    """Of settings without faults."""
    size, form = settings.get("group_size"), settings.get("checkpoint_format") or settings.get("format")
    scheme = Scheme(
        layout="columns",
        stored="qweight",
        bits=settings["bits"],
        group=group_of(128 if size is None else size),
        symmetric=settings.get("sym") is not False,
        targets=_targets(settings.get("modules_in_block_to_quantize")),
        less=0 if form == "gptq_v2" else 1,
        ordered=settings.get("desc_act") is True,
    )
    whole = tuple(Pattern("regex", text.removeprefix(_WHOLE)) for text in settings.get("dynamic") or {})
    return PackedSettings(LABEL, (scheme,), whole, "dynamic")


def _targets(blocks: Any) -> tuple[Pattern, ...]:
    """Endings of names in a layer; all linear ones of it where no list says which."""
    names = [name for block in blocks or () for name in ([block] if isinstance(block, str) else block)]
    return tuple(Pattern("ending", name) for name in names) or (Pattern("linear in layers"),)
