"""Packed checkpoints that are not what config.json says, or that no format here holds: refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.config.model_config import config_notes, unsupported_features


def one_line(done: Any) -> str:
    """The sentence that refuses."""
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    return line


def test_other_options_are_refused(packed, tmp_path, exported):
    checkpoint, _ = packed("GPTQ")
    assert "--quantize 'int4': the checkpoint is packed already (GPTQ)" in one_line(
        exported(checkpoint, "--quantize", "int4")
    )
    assert "--by-reference: codes of the checkpoint lie in other shapes" in one_line(
        exported(checkpoint, "--by-reference")
    )
    check = CliRunner().invoke(main, ["check", str(checkpoint), "--quantize", "int8"])
    assert "is packed already (GPTQ)" in one_line(check)
    facts = json.loads(CliRunner().invoke(main, ["check", str(checkpoint), "--json"]).stdout)["facts"]
    assert "export --by-reference" not in [need["step"] for need in facts["needs"]]


def test_an_adapter_is_refused(packed, tmp_path, exported):
    checkpoint, _ = packed("AWQ")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    at = "base_model.model.model.layers.0.self_attn.o_proj"
    pair = {f"{at}.lora_A.weight": torch.ones(4, 32), f"{at}.lora_B.weight": torch.ones(64, 4)}
    save_file(pair, adapter / "adapter_model.safetensors")
    assert "the checkpoint is packed (AWQ)" in one_line(exported(checkpoint, "--adapter", str(adapter)))
    check = CliRunner().invoke(main, ["check", str(checkpoint), "--adapter", str(adapter)])
    assert "the checkpoint is packed (AWQ)" in one_line(check)


CT = "config_groups.group_0"
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "3 bits": ("GPTQ", {"bits": 3}, "bits 3 is not supported (GPTQ is read with 4, 8)"),
    "bits in quotes": ("GPTQ", {"bits": "4"}, "bits is '4', where a whole number"),
    "bits of 4.0": ("GPTQ", {"bits": 4.0}, "bits is 4.0, where a whole number"),
    "no bits": ("GPTQ", {"bits": None}, "bits is missing"),
    "groups of 16": (
        "GPTQ",
        {"group_size": 16},
        "group_size 16 is not supported: GPTQ is read with groups of a multiple",
    ),
    "groups of 0": ("AWQ", {"group_size": 0}, "group_size 0 is not supported"),
    "marlin": ("GPTQ", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    "marlin, older": ("GPTQ", {"is_marlin_format": True}, "is_marlin_format true is not supported"),
    "other words": ("GPTQ", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
    "two formats": ("GPTQ", {"format": "gptq_v2"}, "checkpoint_format and format contradict each other"),
    "sym in quotes": ("GPTQ", {"sym": "true"}, "sym is 'true', where true or false"),
    "others by pattern": (
        "GPTQ",
        {"dynamic": {"+:.*down_proj": {"bits": 8}}},
        "dynamic '+:.*down_proj' is not supported",
    ),
    "no pattern": ("GPTQ", {"dynamic": {"-:(": {}}}, "dynamic '(' is no pattern"),
    "an adapter within": ("GPTQ", {"adapter": {"name": "lora"}}, "adapter {'name': 'lora'} is not supported"),
    "gemv": ("AWQ", {"version": "gemv"}, "version 'gemv' is not supported"),
    "llm-awq": ("AWQ", {"backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
    "no zero points": ("AWQ", {"zero_point": False}, "zero_point false is not supported"),
    "AWQ of 8 bits": ("AWQ", {"bits": 8}, "bits 8 is not supported (AWQ is read with 4)"),
    "two groups": ("AWQ", {"q_group_size": 64}, "group_size and q_group_size contradict each other"),
    "names in no list": (
        "AWQ",
        {"modules_to_not_convert": "lm_head"},
        "modules_to_not_convert is 'lm_head', where a list",
    ),
    "floats": (
        "compressed-tensors",
        {CT: {"weights": {"type": "float", "num_bits": 8}}},
        "type 'float' is not supported",
    ),
    "2 bits": ("compressed-tensors", {CT: {"weights": {"num_bits": 2}}}, "num_bits 2 is not supported"),
    "activations": (
        "compressed-tensors",
        {CT: {"input_activations": {"num_bits": 8, "dynamic": True}}},
        "activations would be rounded",
    ),
    "a scale a tensor": (
        "compressed-tensors",
        {CT: {"weights": {"strategy": "tensor", "group_size": None}}},
        "strategy 'tensor' is not supported",
    ),
    "blocks": ("compressed-tensors", {CT: {"weights": {"strategy": "block"}}}, "strategy 'block' is not supported"),
    "a strategy without its size": (
        "compressed-tensors",
        {CT: {"weights": {"strategy": "group", "group_size": None}}},
        "strategy group and group_size null contradict each other",
    ),
    "no weights": ("compressed-tensors", {CT: {"weights": None}}, "has no weights"),
    "no groups": ("compressed-tensors", {"config_groups": {}}, "config_groups is empty"),
    "groups of presets": ("compressed-tensors", {"config_groups": {"W4A16": ["Linear"]}}, "config_groups is {"),
    "sparse": ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "zeros left out"),
    "marlin of 2:4": ("compressed-tensors", {"format": "marlin-24"}, "format 'marlin-24' is not supported"),
    "a rounded cache": ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "keys and values would be rounded"),
    "turned activations": ("compressed-tensors", {"transform_config": {"config_groups": {"u": {}}}}, "would be turned"),
    "not compressed": ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
    "a pattern that never ends": (
        "compressed-tensors",
        {"ignore": [r"re:(([a-z._0-9]|[a-z])+)+!"]},
        "patterns such as",
    ),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_are_refused(packed, verdict, what):
    kind, changes, words = SETTINGS[what]
    checkpoint, _ = packed(kind)
    raw = json.loads((checkpoint / "config.json").read_text())
    settings = raw["quantization_config"]
    for key, value in changes.items():
        if key == CT:
            group = settings["config_groups"]["group_0"]
            weights = value.get("weights", {})
            group |= {**value, "weights": weights and {**group["weights"], **weights}} if weights != {} else value
        else:
            settings[key] = value
    (checkpoint / "config.json").write_text(json.dumps(raw))
    found = verdict(checkpoint)
    assert not found.accepted
    for text in (found.check, found.export):
        assert words in " ".join(text.split()), text
        assert kind.partition(",")[0] in text or "quantization_config" in text


_WEIGHTS = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4}
_WEIGHTS |= {"observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}
_GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": _WEIGHTS}
PUBLISHED = {  # as they are written into the config.json of published checkpoints of this family
    "Kimi-K2-Thinking": {
        "config_groups": {"group_0": _GROUP},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
    "llm-compressor": {
        "config_groups": {"group_0": {**_GROUP, "weights": {**_WEIGHTS, "group_size": 128, "actorder": "weight"}}},
        "format": "pack-quantized",
        "global_compression_ratio": 1.89,
        "ignore": ["lm_head", "model.layers.0.self_attn.kv_b_proj"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {"format": "dense", "global_sparsity": 0.12, "sparsity_structure": "unstructured"},
        "transform_config": {},
        "version": "0.10.3",
    },
    "GPTQModel": {
        "bits": 4,
        "checkpoint_format": "gptq",
        "damp_auto_increment": 0.0015,
        "damp_percent": 0.005,
        "desc_act": False,
        "dynamic": None,
        "group_size": 128,
        "lm_head": False,
        "meta": {"quantizer": "gptqmodel:1.1.0"},
        "model_file_base_name": "model",
        "model_name_or_path": "",
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    },
    "AutoAWQ": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": ["mlp.gate."],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_as_they_are_published(bases, name):
    raw = {**bases["v3"], "quantization_config": PUBLISHED[name]}
    assert (unsupported_features(raw), config_notes(raw)) == ((), ())


def test_unknown_keys_are_named(packed, verdict):
    for kind in ("GPTQ", "AWQ", "compressed-tensors"):
        checkpoint, _ = packed(kind, settings={"rounding": "up"}, name=kind)
        found = verdict(checkpoint)
        assert found.accepted, found.check
        assert "quantization_config.'rounding' is not known here: its value 'up' is not read" in found.export


O_PROJ = "model.layers.0.self_attn.o_proj"


def change(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def mutate(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{O_PROJ}.{name}"] = to(tensors[f"{O_PROJ}.{name}"]).contiguous()

    return mutate


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{O_PROJ}.{name}")


def add(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{O_PROJ}.{name}": tensor})


HEADERS: dict[str, tuple[str, Any, str]] = {
    "no scales": ("GPTQ", drop("scales"), "o_proj.scales is missing beside its codes"),
    "no zero points": ("GPTQ", drop("qzeros"), "o_proj.qzeros is missing beside its codes"),
    "no zero points, AWQ": ("AWQ", drop("qzeros"), "o_proj.qzeros is missing beside its codes"),
    "no codes": ("GPTQ", drop("qweight"), "is part of a packed weight, and of none"),
    "no shape": ("compressed-tensors", drop("weight_shape"), "o_proj.weight_shape is missing beside its codes"),
    "no zero points, said": (
        "compressed-tensors, zero points",
        drop("weight_zero_point"),
        "o_proj.weight_zero_point is missing beside its codes",
    ),
    "codes of another shape": ("GPTQ", change("qweight", lambda t: t[:-1]), "is missing"),
    "codes of 64 bits": ("AWQ", change("qweight", lambda t: t.long()), "is I64"),
    "codes of three dims": (
        "compressed-tensors",
        change("weight_packed", lambda t: t[None]),
        "where quantization_config",
    ),
    "scales turned": ("GPTQ", change("scales", lambda t: torch.cat([t, t], 1)), "o_proj.scales is float16 [1, 128]"),
    "scales of whole numbers": ("AWQ", change("scales", lambda t: t.int()), "o_proj.scales is I32"),
    "fewer scales": ("compressed-tensors", change("weight_scale", lambda t: t[:-1]), "o_proj.weight_scale is float16"),
    "zero points turned": ("AWQ", change("qzeros", lambda t: t.T), "o_proj.qzeros is I32"),
    "groups of fewer columns": ("GPTQ", change("g_idx", lambda t: t[:-1]), "o_proj.g_idx is I32 [31]"),
    "both whole and packed": ("GPTQ", add("weight", torch.ones(64, 32)), "are both there: remove one"),
    "scales of activations": ("compressed-tensors", add("input_scale", torch.ones(1)), "input_scale"),
    "codes of another method": ("GPTQ", add("weight_packed", torch.ones(64, 4).int()), "is part of a packed weight"),
    "no order of columns": ("GPTQ", drop("g_idx"), "o_proj.g_idx is missing beside its codes"),
    "columns in any order": (
        "GPTQ",
        lambda tensors: change("g_idx", lambda t: (torch.arange(len(t)) % 2).int())(tensors),
        "activation order",
    ),
}


@pytest.mark.parametrize("what", HEADERS)
def test_tensors_that_are_not_as_described(packed, verdict, what):
    kind, mutate, words = HEADERS[what]
    ordered = {"desc_act": True} if "order" in what else {}
    found = verdict(packed(kind, settings=ordered, mutate=mutate)[0])
    assert not found.accepted
    for text in (found.check, found.export):
        text = " ".join(text.split())
        assert words in text or (words == "is missing" and "o_proj" in text), text
        assert text.count("error: ") == 1


def test_columns_whose_order_is_plain_are_taken(packed, verdict, packers):
    """desc_act without an order of its own, as with a group a row."""
    for kind, name in (("GPTQ", "groups"), ("GPTQ, rows", "rows")):
        checkpoint, result = packed(kind, settings={"desc_act": True}, name=name)
        packers.check_equal(verdict(checkpoint).bundle, checkpoint, result)


def holding(value: float, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def to(scales: torch.Tensor) -> torch.Tensor:
        made = scales.to(dtype)
        made.view(-1)[3] = value
        return made

    return to


NUMBERS: dict[str, tuple[str, Any, str]] = {
    "a scale of float32": (
        "compressed-tensors",
        change("weight_scale", holding(1 / 3, torch.float32)),
        "1 of its 64 scales are no numbers of float16, e.g. 0.333333343",
    ),
    "a scale too small": (
        "AWQ",
        change("scales", holding(2**-20 * 1.0078125, torch.bfloat16)),
        "1 of its 64 scales are no numbers of float16",
    ),
    "a scale too large": ("GPTQ", change("scales", holding(1e6, torch.bfloat16)), "scales are no numbers of float16"),
    "NaN": ("GPTQ", change("scales", holding(float("nan"), torch.float16)), "32 weights are NaN or infinite"),
    "infinity": ("AWQ", change("scales", holding(float("inf"), torch.bfloat16)), "32 weights are NaN or infinite"),
    "zeros": ("GPTQ", change("scales", torch.zeros_like), "o_proj"),
    "another shape": (
        "compressed-tensors",
        change("weight_shape", lambda t: t.flip(0)),
        "o_proj.weight_shape says [32, 64], its codes are of [64, 32]",
    ),
    "zero points of symmetric codes": (
        "GPTQ",
        change("qzeros", lambda t: t - 1),
        "of its 64 zero points are not 8, e.g. 7, and quantization_config says that codes are symmetric",
    ),
    "a zero point that programs read in two ways": (
        "GPTQ, zero points",
        change("qzeros", lambda t: torch.full_like(t, -1)),
        "zero points are stored as 15, which some programs read as 16 and some as 0",
    ),
    "columns in any order": (
        "GPTQ",
        change("g_idx", lambda t: torch.arange(len(t)).flip(0).int() % 2),
        "the columns of a group do not lie side by side",
    ),
    "codes too far from their zero points": (
        {"kind": "gptq", "bits": 8, "group": 32, "symmetric": False},
        change("qzeros", lambda t: t * 0),
        "and int8 holds -128 to 127",
    ),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_no_format_holds(packed, what, exported):
    """Only export sees numbers; each is refused by the tensor's name."""
    kind, mutate, words = NUMBERS[what]
    line = one_line(exported(packed(kind, mutate=mutate)[0]))
    assert words in line
    assert "o_proj" in line


def test_numbers_that_a_user_allows_are_kept(packed, tmp_path, exported):
    checkpoint, _ = packed("GPTQ", mutate=change("scales", holding(float("nan"), torch.float16)))
    assert exported(checkpoint, "--allow-nonfinite").exit_code == 0
    scales = load_file(tmp_path / "out" / WEIGHTS_FILE)[f"{O_PROJ}.weight_scale"]
    assert scales.isnan().sum() == 1
