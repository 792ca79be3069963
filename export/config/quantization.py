"""quantization_config: fp8 in blocks of 128 x 128 and packed weights are read, other formats refused by name."""

from __future__ import annotations

from typing import Any

from deepseek_trt.export.packed.methods import method_of
from deepseek_trt.export.text.wording import shown

FP8_BLOCK = 128  # rows and columns that share a scale in fp8 checkpoints

# quant_method: what people call the format; those that are read are packed/methods.py's and fp8.
FORMATS: dict[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVIDIA ModelOpt (NVFP4)",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "fbgemm_fp8": "FBGEMM fp8",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "torchao": "torchao",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "higgs": "HIGGS",
    "gguf": "GGUF",
    "bitnet": "BitNet",
    "quark": "AMD Quark",
    "fp_quant": "FP-Quant",
    "auto-round": "AutoRound",
    "auto_round": "AutoRound",
    "metal": "Metal",
    "mlx": "MLX",
    "fouroversix": "Four Over Six",
    "sinq": "SINQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "marlin": "Marlin",
    "smoothquant": "SmoothQuant",
    "w8a8_int8": "int8 weights and activations",
    "blockwise_int8": "int8 in blocks",
}
# Keys by which a format is known where quant_method is absent, all of which must be there.
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("load_in_4bit",), "bitsandbytes"),
    (("load_in_8bit",), "bitsandbytes"),
    (("quant_algo",), "modelopt"),
    (("config_groups",), "compressed-tensors"),
    (("group_size", "bits", "mode"), "mlx"),
    (("zero_point",), "awq"),
    (("desc_act",), "gptq"),
    (("group_size", "bits"), "mlx"),
)
# Keys inside quantization_config that are known for fp8; everything else is named in a note.
FP8_KEYS: dict[str, str] = {
    "quant_method": "fp8",
    "weight_block_size": f"must be [{FP8_BLOCK}, {FP8_BLOCK}]",
    "fmt": "must be e4m3",
    "scale_fmt": "absent, or ue8m0 (V3.1): powers of two, as float32 or in eight bits",
    "activation_scheme": "harmless: activations are computed in the dtype of the export",
    "modules_to_not_convert": "harmless: each tensor's dtype says it",
    "ignored_layers": "harmless: each tensor's dtype says it",
    "dequantize": "harmless: fp8 is kept at export, or dequantised by `--quantize none`",
}
_ADVICE = (
    "use the bfloat16 checkpoint, or DeepSeek's own fp8 one, or one in compressed-tensors (pack-quantized), GPTQ or "
    "AWQ with 4 or 8 bits"
)


def unsupported_quantization(settings: dict[str, Any]) -> list[str]:
    """The sentence that refuses these settings, or nothing; an empty object says that nothing is quantised."""
    if not settings:
        return []
    method = settings.get("quant_method") or _method_by_signs(settings)
    packed = method_of({"quant_method": method})
    if packed is not None and not settings.get("quant_method"):
        return [
            f"quantization_config is {packed.label}'s by its keys, and has no quant_method: write "
            f'"quant_method": "{method}" into it, and keys as transformers names them, or {_ADVICE}'
        ]
    if packed is not None:
        return [f"quantization_config says {packed.label}: {fault}" for fault in packed.faults(settings)]
    if method != "fp8":
        name = FORMATS.get(method, shown(method)) if isinstance(method, str) else shown(method)
        algorithm = settings.get("quant_algo")
        kind = f" {shown(algorithm)}" if algorithm else ""
        return [
            f"quantization_config says {name}{kind} (quant_method {shown(method)}), which is not supported; {_ADVICE}"
        ]
    return _unsupported_fp8(settings)


def _unsupported_fp8(settings: dict[str, Any]) -> list[str]:
    form, block, scales = settings.get("fmt") or "e4m3", settings.get("weight_block_size"), settings.get("scale_fmt")
    if form not in ("e4m3", "float8_e4m3fn"):
        return [f"fp8 format {shown(form)} is not supported; use e4m3, or the bfloat16 checkpoint"]
    if block != [FP8_BLOCK, FP8_BLOCK] or any(isinstance(size, bool) for size in block):
        return [
            f"fp8 weight_block_size {shown(block)} is not supported; use a checkpoint with "
            f"[{FP8_BLOCK}, {FP8_BLOCK}], or the bfloat16 one"
        ]
    if scales not in (None, "float", "float32", "ue8m0"):
        return [f"fp8 scale_fmt {shown(scales)} is not supported; use one with ue8m0 or float32, or the bfloat16 one"]
    return []


def _method_by_signs(settings: dict[str, Any]) -> str:
    for keys, method in _SIGNS:
        if all(settings.get(key) is not None for key in keys):
            return method
    return "unknown"


def quantization_notes(settings: dict[str, Any]) -> tuple[str, ...]:
    """One sentence for each key that is not known of the method."""
    if packed := method_of(settings):
        return tuple(packed.notes(settings))
    return tuple(
        f"config.json's key quantization_config.{shown(key)} is not known here: its value {shown(value)} is not read"
        for key, value in settings.items()
        if key not in FP8_KEYS and value not in (None, False)
    )
