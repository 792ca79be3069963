"""Formats that are not read, each refused by its name: seen by side files, tensor names and dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.recipes import FP8, SCALE_SUFFIX
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.json_file import read_object
from deepseek_trt.export.packed.methods import method_of
from deepseek_trt.export.reading.tensors import PACKED, StoredTensor
from deepseek_trt.export.reading.weight_files import CONFIG_FILE, weights_in
from deepseek_trt.export.text.wording import shown, some

ADAPTER_CONFIG = "adapter_config.json"
_MEND = (
    f"use the bfloat16 checkpoint that it was made from, or one in fp8 with *{SCALE_SUFFIX}, or one whose config.json "
    "says compressed-tensors (pack-quantized), GPTQ or AWQ with 4 or 8 bits"
)
_BUNDLE_FILE = "manifest.json"  # of our own bundles; their description is no part of reading a checkpoint
# Files without which no program would call the folder that; each beside tensors of its own format.
_SIDE_FILES = {
    "hf_quant_config.json": "modelopt (NVFP4, FP8)",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
# Keys of side files, and of quantization_config, that decide how packed numbers are read.
_DECIDING = {
    **{key: key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "version", "zero_point")},
    **{"w_bit": "bits", "q_group_size": "group_size"},
}
# Endings of files that hold weights, where there is no safetensors file; the first that is found gives the name.
_OTHER_FILES = {
    ".gguf": "GGUF (llama.cpp)",
    ".bin": "PyTorch pickles (pytorch_model.bin)",
    ".bin.index.json": "PyTorch pickles (pytorch_model.bin)",
    ".distcp": "a distributed checkpoint of torch",
    ".pth": "PyTorch pickles (consolidated.*.pth)",
    ".msgpack": "Flax",
    ".h5": "TensorFlow",
    ".npz": "MLX (weights.npz)",
    ".onnx": "ONNX graphs",
    ".ckpt": "PyTorch pickles (*.ckpt)",
    ".pt": "PyTorch pickles (*.pt)",
}
# Endings of tensor names that belong to one format; earlier rows are the more particular ones.
_SUFFIXES = (
    ("EXL2", (".q_weight", ".q_scale", ".q_invperm", ".q_groups")),
    ("EXL3", (".trellis", ".suh", ".svh")),
    ("GPTQ", (".g_idx",)),
    ("AWQ", (".qweight", ".qzeros")),
    ("NVFP4 (compressed-tensors)", (".weight_global_scale", ".input_global_scale")),
    ("compressed-tensors", (".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx")),
    ("NVFP4 (modelopt)", (".weight_scale_2",)),
    ("bitsandbytes", (".absmax", ".quant_map", ".nested_absmax", ".SCB", "__nf4", "__fp4", ".weight_format")),
    ("MXFP4", ("_blocks",)),
    ("HQQ", (".W_q",)),
    ("AQLM", (".codebooks",)),
    ("VPTQ", (".centroids",)),
    ("quanto", (".weight._data",)),
    ("torchao", (":qdata", "_qdata")),
    ("MLX, quantized", (".biases",)),
    ("one scale a tensor or channel, as compressed-tensors and modelopt write", (".weight_scale", ".input_scale")),
    ("another quantization", (".scales", "_scales", ".weight_scale_1", ".activation_scale")),
)
_INFERENCE = re.compile(r"model\d+-mp\d+\.safetensors")  # what inference/convert.py writes, under names of its own
_FP8_KINDS = ("F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2")


def check_folder(root: Path) -> None:
    """Raise CheckpointError, with what it is, where the folder holds something else than a safetensors checkpoint."""
    if not root.is_dir():
        raise CheckpointError(
            f"{root} is not a folder, so that config.json is missing: give the folder of config.json and *.safetensors"
        )
    try:
        names = [path.name for path in root.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror or error}") from None
    _refuse_bundle(root)
    safetensors = [name for name in weights_in(root) if name.endswith((".safetensors", ".safetensors.index.json"))]
    if ADAPTER_CONFIG in names and not [name for name in safetensors if not name.startswith("adapter_model")]:
        raise CheckpointError(
            f"{root} is an adapter ({ADAPTER_CONFIG}), not a model: "
            f"export the model that it was trained on with it, deepseek-trt export BASE OUT --adapter {root}"
        )
    if not safetensors:
        _refuse_other_files(root)
    if any(name.startswith("shard-") for name in safetensors):
        raise CheckpointError(f"{root} is a distributed checkpoint (shard-*): save the model whole")
    split = next((name for name in safetensors if _INFERENCE.fullmatch(name)), None)
    if split and "model.safetensors" not in names:
        raise CheckpointError(
            f"{root} is split for DeepSeek's own inference code ({split}): use the checkpoint that it was made from"
        )
    for name, kind in _SIDE_FILES.items():
        if name in names:
            _check_side_file(root / name, kind)


def check_tensors(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError, with the format's name, where tensors are packed, or scaled unlike V3's fp8."""
    for kind, suffixes in _SUFFIXES:
        found = next((name for name in tensors if name.endswith(suffixes)), None)
        if found:
            kind = "GPTQ" if kind == "AWQ" and _is_gptq(tensors) else kind
            raise CheckpointError(
                f"the checkpoint is quantized ({kind}: tensor {shown(found)}), which is not supported: {_MEND}"
            )
    for name, tensor in tensors.items():
        if is_packed_number(tensor):
            raise CheckpointError(
                f"tensor {shown(name)} holds packed numbers ({tensor.dtype}): the checkpoint is quantized, "
                f"which is not supported: {_MEND}"
            )
        if tensor.dtype == FP8 and len(tensor.shape) != 2:
            raise CheckpointError(f"tensor {shown(name)} is fp8 {list(tensor.shape)}; only matrices may be fp8")
        if tensor.dtype in _FP8_KINDS and not name.endswith(SCALE_SUFFIX):
            raise CheckpointError(f"tensor {shown(name)} is {tensor.dtype}; of fp8, {FP8} is supported: {_MEND}")


def is_packed_number(tensor: StoredTensor) -> bool:
    """Whether its dtype is one that weights are packed in."""
    return tensor.dtype in _PACKED


def quantization_notes(raw: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """One sentence where config.json and the tensors do not agree on whether the weights are quantized."""
    kinds, said = {tensor.dtype for tensor in tensors.values()}, bool(raw.get("quantization_config"))
    if FP8 in kinds and not said:
        return (f"config.json has no quantization_config: fp8 tensors are multiplied by their *{SCALE_SUFFIX}",)
    if said and not kinds & {FP8, PACKED}:
        return ("config.json has a quantization_config, but no tensor is quantized: it is ignored",)
    return ()


def _is_gptq(tensors: Mapping[str, StoredTensor]) -> bool:
    """GPTQ packs numbers of a column into one, AWQ those of a row; zeros are packed along rows by both."""
    for name, weight in tensors.items():
        zeros = tensors.get(f"{name.removesuffix('.qweight')}.qzeros")
        if name.endswith(".qweight") and zeros is not None and weight.shape and zeros.shape:
            return weight.shape[-1] != zeros.shape[-1]
    return False


def _refuse_bundle(root: Path) -> None:
    with_graphs = _object(root / _BUNDLE_FILE)
    if {"schema_version", "graphs", "weights"} <= with_graphs.keys():
        raise CheckpointError(
            f"{root} is a bundle that deepseek-trt export wrote, not a checkpoint: give it to the other commands, "
            f"or export its checkpoint, {with_graphs.get('checkpoint')}"
        )


def _refuse_other_files(root: Path) -> None:
    names = sorted(path.name for path in root.iterdir())
    for name, kind in _other_files(names):
        raise CheckpointError(
            f"{root} holds {kind}, which is not supported ({shown(name)[1:-1]}): use a checkpoint in safetensors, "
            "as transformers' save_pretrained writes it"
        )


def _other_files(names: list[str]) -> Iterator[tuple[str, str]]:
    for ending, kind in _OTHER_FILES.items():
        for name in names:
            if name.endswith(ending) and (not ending.startswith(".bin") or name.startswith("pytorch_model")):
                yield name, kind


def _check_side_file(file: Path, kind: str) -> None:
    """CheckpointError where it says that weights are quantized, and config.json does not say the same."""
    settings = _object(file.with_name(CONFIG_FILE)).get("quantization_config")
    method = method_of(settings) if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or method is None or method.label != kind:
        if said := _quantized_by(file, kind):
            raise CheckpointError(f"{file.parent} is quantized ({said}; {file.name}), which is not supported: {_MEND}")
        return
    mine, other = (_deciding(each) for each in (settings, _object(file)))
    for key in mine.keys() & other.keys():
        if mine[key] != other[key]:
            raise CheckpointError(
                f"{file} says {key} {shown(other[key])}, and config.json's quantization_config {shown(mine[key])}: "
                "download both again from the same place"
            )


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how packed numbers are read, by one name a setting."""
    found = {_DECIDING[key]: value for key, value in settings.items() if key in _DECIDING and value is not None}
    return {key: value.lower() if isinstance(value, str) else value for key, value in found.items()}


def _quantized_by(file: Path, kind: str) -> str | None:
    """What the side file says of the method, or `kind`; None where it says that nothing is quantized."""
    raw = _object(file)
    settings = raw.get("quantization", raw)
    if not isinstance(settings, dict):
        return kind
    if "quant_algo" in settings and not settings["quant_algo"] and not settings.get("kv_cache_quant_algo"):
        return None
    named = settings.get("quant_algo") or settings.get("quant_method")
    return f"{kind.split(' ')[0]} {some([str(named)])}" if named else kind


def _object(file: Path) -> dict[str, Any]:
    """The JSON object that the file holds, empty where it holds none."""
    try:
        return read_object(file, CheckpointError, nan=True)
    except (CheckpointError, FileNotFoundError):
        return {}
