"""Checkpoints that are published packed are taken as they are: each number of the bundle is the packed one, bit by bit.

The packers and the numbers that they pack are packers.py's, of the writers' descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.engines.sessions.graphs import OrtGraphs
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.config.model_config import config_notes, unsupported_features
from deepseek_trt.export.packed import unpack
from deepseek_trt.validate.backends.published_packed import PublishedPacked
from deepseek_trt.validate.backends.published_weights import published_weights

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "v_head_dim": 16}
SIZES |= {"kv_lora_rank": 32}
LAYER = "model.layers.1.mlp.experts"
KINDS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"kind": "compressed"},
    "compressed-tensors, groups of 64": {"kind": "compressed", "group": 64, "scales": torch.bfloat16},
    "compressed-tensors, rows": {"kind": "compressed", "group": None},
    "compressed-tensors, zero points": {"kind": "compressed", "symmetric": False},
    "compressed-tensors, 8 bits": {"kind": "compressed", "bits": 8, "group": 128},
    "compressed-tensors, a code a byte": {"kind": "plain", "bits": 8, "group": None, "scales": torch.bfloat16},
    "compressed-tensors, a code a byte, zero points": {"kind": "plain", "bits": 8, "symmetric": False},
    "GPTQ": {"kind": "gptq", "group": 32},
    "GPTQ, zero points": {"kind": "gptq", "group": 64, "symmetric": False},
    "GPTQ, 8 bits": {"kind": "gptq", "bits": 8, "group": 128},
    "GPTQ, second format": {"kind": "gptq_v2", "symmetric": False},
    "GPTQ, rows": {"kind": "gptq", "group": None},
    "AWQ": {"kind": "awq", "group": 32, "symmetric": False},
    "AWQ, groups of 64": {"kind": "awq", "group": 64, "symmetric": False, "scales": torch.bfloat16},
}


def linear(module: str) -> bool:
    """What the published ones pack: linear layers but kv_b_proj and the head."""
    return "_proj" in module and "kv_b_proj" not in module


@pytest.fixture
def packed(made, packers) -> Callable[..., Any]:
    """packed(kind, base="v2", wanted=linear, settings={}, mutate=..., **changes of config.json)"""

    def make(
        kind: str | dict[str, Any],
        base: str = "v2",
        wanted: Callable[[str], bool] = linear,
        settings: dict[str, Any] | None = None,
        mutate: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
        **changes: Any,
    ) -> tuple[Path, Any]:
        packing = packers.Packing(**(KINDS[kind] if isinstance(kind, str) else kind))
        one = made(base, **{**SIZES, **changes}, quantization_config=packing.config(**(settings or {})))
        result = packers.pack(one.tensors, packing, wanted)
        mutate(result.tensors)
        save_file(result.tensors, one.path / "model.safetensors", metadata={"format": "pt"})
        return one.path, result

    return make


def widened(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The numbers of a graph tensor in float32, unpacked by code of this file alone."""
    if f"{name}_scale" not in tensors:
        return tensors[name].float()
    codes, scales = tensors[name], tensors[f"{name}_scale"].float()
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes % 16, codes.div(16, rounding_mode="floor")], -1).flatten(-2).float() - 8
    return codes.float() * scales.repeat_interleave(32, -1)


def expected(weights: dict[str, torch.Tensor], name: str, raw: dict[str, Any]) -> torch.Tensor:
    """A graph tensor's numbers by those of published names."""
    if name.startswith(LAYER):
        stack = name.rpartition(".")[2]
        return torch.stack([weights[f"{LAYER}.{e}.{stack}.weight"] for e in range(raw["n_routed_experts"])])
    if name.endswith(("w_uk", "w_uv")):
        both = weights[f"{name.rpartition('.')[0]}.kv_b_proj.weight"].unflatten(0, (raw["num_attention_heads"], -1))
        nope = raw["qk_nope_head_dim"]
        return both[:, :nope] if name.endswith("w_uk") else both[:, nope:]
    return weights[name]


def check_equal(bundle: Path, checkpoint: Path, result: Any) -> dict[str, torch.Tensor]:
    """Every number of the bundle's file is the checkpoint's, bit by bit."""
    raw, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(bundle / WEIGHTS_FILE)
    weights = result.tensors | result.numbers
    for name in tensors:
        if not name.endswith("_scale"):
            found, wanted = widened(tensors, name), expected(weights, name, raw)
            assert torch.equal(found.view(torch.int32), wanted.float().view(torch.int32)), name
    return tensors


@pytest.mark.parametrize(
    ("kind", "base"),
    [(kind, "v3") for kind in KINDS] + [(kind, "v2") for kind in ("compressed-tensors", "GPTQ", "AWQ")],
)
def test_every_number_is_the_packed_one(packed, verdict, packers, kind, base):
    checkpoint, result = packed(kind, base)
    found = verdict(checkpoint)
    assert found.accepted, found.export
    tensors = check_equal(found.bundle, checkpoint, result)
    packing = packers.Packing(**KINDS[kind])
    wanted = torch.uint8 if packing.symmetric and packing.bits == 4 else torch.int8
    assert {tensors[f"{LAYER}.{stack}_proj"].dtype for stack in ("gate", "up", "down")} == {wanted}
    assert {t.dtype for name, t in tensors.items() if name.endswith("_scale")} == {torch.float16}
    narrow = {name.removesuffix("_scale") for name in tensors if name.endswith("_scale")}
    assert narrow == {f"{LAYER}.{s}_proj" for s in ("gate", "up", "down")} | {
        name for name in result.numbers if not name.startswith(LAYER)
    }
    for text in (found.check, found.export):
        assert "its codes and scales are taken as they are" in text.replace("\n", " ")
    assert Bundle.open(found.bundle, verify=True).manifest.quantization.name in kind


@pytest.mark.parametrize("kind", ["compressed-tensors", "GPTQ, zero points", "AWQ", "GPTQ, 8 bits"])
@pytest.mark.parametrize("rope", [True, False])
def test_rows_are_put_in_the_order_of_the_graphs(packed, made, verdict, kind, rope):
    """Where rope rotates halves, rows are paired; the whole checkpoint of the same numbers shows which."""
    checkpoint, result = packed(kind, "v3", rope_interleave=rope)
    tensors = load_file(verdict(checkpoint).bundle / WEIGHTS_FILE)
    whole = made("v3", name="whole", **SIZES, rope_interleave=rope)
    save_file(result.numbers | _whole(result), whole.path / "model.safetensors")
    others = load_file(verdict(whole.path).bundle / WEIGHTS_FILE)
    assert not [name for name in others if not torch.equal(widened(tensors, name), others[name])]


def _whole(result: Any) -> dict[str, torch.Tensor]:
    endings = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape")
    return {name: t for name, t in result.tensors.items() if not name.endswith(tuple(f".{e}" for e in endings))}


@pytest.mark.parametrize("kind", ["compressed-tensors, zero points", "GPTQ", "GPTQ, zero points", "AWQ"])
def test_a_few_rows_at_a_time_are_the_same(packed, verdict, monkeypatch, kind):
    """Large matrices are unpacked in blocks of rows, which some layouts store as columns."""
    monkeypatch.setattr(unpack, "_BLOCK", 700)
    checkpoint, result = packed(kind, "v3", lambda m: linear(m) or "kv_b_proj" in m)
    check_equal(verdict(checkpoint, "--dtype", "float32").bundle, checkpoint, result)


@pytest.mark.parametrize("kind", ["compressed-tensors, groups of 64", "GPTQ, zero points", "AWQ", "GPTQ, 8 bits"])
def test_graphs_compute_what_the_whole_numbers_do(packed, made, verdict, kind):
    checkpoint, result = packed(kind, "v3", attention_bias=True)
    whole = made("v3", name="whole", **SIZES, attention_bias=True)
    save_file(result.numbers | _whole(result), whole.path / "model.safetensors")
    bundles = [Bundle.open(verdict(path).bundle) for path in (checkpoint, whole.path)]
    known = {
        "input_ids": np.arange(12).reshape(2, 6),
        "sequence_lengths": np.array([6, 4]),
        "page_table": np.array([[1], [2]]),
    }
    inputs = {t.name: t for t in bundles[0].graph("prefill").inputs}
    sizes = {"batch_size": 2, "sequence_length": 6, "pages": 4, "table": 1}
    empty = {
        name: np.zeros([sizes.get(d, 4) if isinstance(d, str) else d for d in t.dims]) for name, t in inputs.items()
    }
    given = {name: known.get(name, empty[name]).astype(t.dtype) for name, t in inputs.items()}
    ours, theirs = (OrtGraphs(bundle).run("prefill", given)["logits"] for bundle in bundles)
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


# What stands beside each other


def one_line(done: Any) -> str:
    """The sentence that refuses."""
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    return line


def export(folder: Path, *options: str) -> Any:
    out = folder.parent / "out"
    done = CliRunner().invoke(main, ["export", str(folder), str(out), *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert out.exists() == (done.exit_code == 0)
    return done


@pytest.mark.parametrize("other", ["8 bits", "zero points"])
def test_experts_of_several_kinds_become_int8(made, packers, tmp_path, other):
    """Two groups of modules, the second of one expert's projection: the layer's stacks are of one format."""
    first = packers.Packing("compressed")
    second = packers.Packing("compressed", 8 if other == "8 bits" else 4, 64, other == "8 bits", torch.bfloat16, 1)
    groups = {"a": first.config()["config_groups"]["group_0"], "b": second.config()["config_groups"]["group_0"]}
    groups["b"]["targets"] = [r"re:.*experts\.2\.up_proj"]
    one = made("v3", **SIZES, quantization_config=first.config(config_groups=groups))
    particular = f"{LAYER}.2.up_proj"
    result = packers.pack(one.tensors, first, lambda m: linear(m) and m != particular)
    more = packers.pack({f"{particular}.weight": one.tensors[f"{particular}.weight"]}, second, lambda m: True)
    result.tensors.pop(f"{particular}.weight")
    result.tensors.update(more.tensors)
    result.numbers.update(more.numbers)
    save_file(result.tensors, one.path / "model.safetensors")
    done = export(one.path)
    assert done.exit_code == 0, done.output
    tensors = check_equal(tmp_path / "out", one.path, result)
    assert {tensors[f"{LAYER}.{s}_proj"].dtype for s in ("gate", "up", "down")} == {torch.int8}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert "3 weights of 4 bits are stored in 8" in done.output


@pytest.mark.parametrize("whole", [f"{LAYER}.1.up_proj", f"{LAYER}.gate_proj"])
def test_experts_of_which_some_are_whole_are_refused(packed, verdict, whole):
    """One expert's projection, or one projection of all."""
    stack = whole.rpartition(".")[2]
    ours = (lambda m: m == whole) if whole[-11:-10].isdigit() else (lambda m: LAYER in m and m.endswith(stack))
    found = verdict(packed("compressed-tensors", "v3", lambda m: linear(m) and not ours(m))[0])
    assert not found.accepted
    for text in (found.check, found.export):
        assert "an op takes the experts of a layer together" in text.replace("\n", " ")


@pytest.mark.parametrize("kind", ["compressed-tensors", "GPTQ, zero points", "AWQ"])
def test_what_graphs_take_whole_becomes_whole(packed, verdict, kind):
    """kv_b_proj, embeddings, the router, and rows that hold no groups of 32."""

    def wanted(module: str) -> bool:
        return "_proj" in module or module.endswith(("embed_tokens", "mlp.gate", "lm_head"))

    checkpoint, result = packed(
        kind, "v3", wanted, {"ignore": []} if "comp" in kind else None, q_lora_rank=24, n_routed_experts=8
    )
    found = verdict(checkpoint, "--dtype", "float32")
    tensors = check_equal(found.bundle, checkpoint, result)
    whole = {name for name in tensors if f"{name}_scale" not in tensors and tensors[name].dim() > 1}
    layers = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("w_uk", "w_uv", "q_b_proj.weight")]
    assert {name for name in whole if not name.endswith("_scale")} == {
        *layers,
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight",
    }
    assert "8 packed weights are stored as whole numbers" in found.export.replace("\n", " ")


def test_whole_numbers_are_rounded_once(packed, verdict):
    checkpoint, result = packed("AWQ", "v2", lambda m: linear(m) or "kv_b_proj" in m)
    found = verdict(checkpoint, "--dtype", "bfloat16")
    tensors, raw = load_file(found.bundle / WEIGHTS_FILE), json.loads((checkpoint / "config.json").read_text())
    for half in ("w_uk", "w_uv"):
        name = f"model.layers.0.self_attn.{half}"
        assert torch.equal(tensors[name], expected(result.numbers, name, raw).bfloat16())


@pytest.mark.parametrize(
    ("kind", "settings", "wanted", "words"),
    [
        ("AWQ", {"modules_to_not_convert": ["o_proj"]}, linear, ["says that 2 modules are whole, and they are packed"]),
        ("AWQ", {"modules_to_not_convert": None}, linear, ["2 modules are whole, and", "kv_b_proj"]),
        ("compressed-tensors", {"ignore": ["re:.*kv_b.*"]}, linear, ["1 modules are whole, and", "lm_head"]),
        ("compressed-tensors", {"ignore": ["lm_head", "re:.*kv_b.*", "re:.*o_proj$"]}, linear, ["2 modules are whole"]),
        ("GPTQ", {"dynamic": {"-:.*kv_b_proj": {}}}, linear, []),
        ("GPTQ", {"dynamic": {"-:.*(kv_b|up)_proj": {}}}, linear, ["6 modules are whole, and they are packed"]),
        ("GPTQ", {"modules_in_block_to_quantize": [["self_attn.o_proj"]]}, linear, ["modules are packed that"]),
        ("GPTQ", {"modules_in_block_to_quantize": ["self_attn.o_proj"]}, lambda m: "o_proj" in m, []),
    ],
    ids=str,
)
def test_lists_of_modules_that_the_tensors_contradict_are_named(packed, verdict, kind, settings, wanted, words):
    checkpoint, result = packed(kind, "v3", wanted, settings)
    found = verdict(checkpoint)
    check_equal(found.bundle, checkpoint, result)
    for text in (found.check, found.export):
        text = " ".join(text.split())
        assert all(word in text for word in words), text
        assert words or not ("modules are whole" in text or "modules are packed" in text)


# What is refused


def test_other_options_are_refused(packed, tmp_path):
    checkpoint, _ = packed("GPTQ")
    assert "--quantize 'int4': the checkpoint is packed already (GPTQ)" in one_line(
        export(checkpoint, "--quantize", "int4")
    )
    assert "--by-reference: codes of the checkpoint lie in other shapes" in one_line(
        export(checkpoint, "--by-reference")
    )
    check = CliRunner().invoke(main, ["check", str(checkpoint), "--quantize", "int8"])
    assert "is packed already (GPTQ)" in one_line(check)
    facts = json.loads(CliRunner().invoke(main, ["check", str(checkpoint), "--json"]).stdout)["facts"]
    assert "export --by-reference" not in [need["step"] for need in facts["needs"]]


def test_an_adapter_is_refused(packed, tmp_path):
    checkpoint, _ = packed("AWQ")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    at = "base_model.model.model.layers.0.self_attn.o_proj"
    pair = {f"{at}.lora_A.weight": torch.ones(4, 32), f"{at}.lora_B.weight": torch.ones(64, 4)}
    save_file(pair, adapter / "adapter_model.safetensors")
    assert "the checkpoint is packed (AWQ)" in one_line(export(checkpoint, "--adapter", str(adapter)))
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


def test_columns_whose_order_is_plain_are_taken(packed, verdict):
    """desc_act without an order of its own, as with a group a row."""
    for kind, name in (("GPTQ", "groups"), ("GPTQ, rows", "rows")):
        checkpoint, result = packed(kind, settings={"desc_act": True}, name=name)
        check_equal(verdict(checkpoint).bundle, checkpoint, result)


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
def test_numbers_that_no_format_holds(packed, what):
    """Only export sees numbers; each is refused by the tensor's name."""
    kind, mutate, words = NUMBERS[what]
    line = one_line(export(packed(kind, mutate=mutate)[0]))
    assert words in line
    assert "o_proj" in line


def test_numbers_that_a_user_allows_are_kept(packed, tmp_path):
    checkpoint, _ = packed("GPTQ", mutate=change("scales", holding(float("nan"), torch.float16)))
    assert export(checkpoint, "--allow-nonfinite").exit_code == 0
    scales = load_file(tmp_path / "out" / WEIGHTS_FILE)[f"{O_PROJ}.weight_scale"]
    assert scales.isnan().sum() == 1


# Files beside the weights, and names


SIDE = {"GPTQ": "quantize_config.json", "AWQ": "quant_config.json"}


@pytest.mark.parametrize("kind", SIDE)
def test_a_side_file_that_says_the_same(packed, verdict, kind):
    checkpoint, result = packed(kind)
    settings = {"GPTQ": {"bits": 4, "group_size": 32, "desc_act": False}, "AWQ": {"w_bit": 4, "version": "GEMM"}}[kind]
    (checkpoint / SIDE[kind]).write_text(json.dumps({**settings, "damp_percent": 0.1}))
    check_equal(verdict(checkpoint).bundle, checkpoint, result)


@pytest.mark.parametrize("kind", SIDE)
def test_a_side_file_that_says_another_thing(packed, verdict, kind):
    checkpoint, _ = packed(kind)
    (checkpoint / SIDE[kind]).write_text(json.dumps({"group_size": 128, "q_group_size": 128}))
    found = verdict(checkpoint)
    assert not found.accepted
    assert "says group_size 128, and config.json's quantization_config 32" in " ".join(found.check.split())


def test_names_with_a_prefix_and_shards(packed, verdict):
    checkpoint, result = packed("compressed-tensors", "v3")
    tensors = {f"module.{name}": tensor for name, tensor in result.tensors.items()}
    names = sorted(tensors)
    (checkpoint / "model.safetensors").unlink()
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, checkpoint / file)
    index = {name: file for file, mine in shards.items() for name in mine}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    check_equal(verdict(checkpoint).bundle, checkpoint, result)


# validate reads them by code of its own


@pytest.mark.parametrize("kind", KINDS)
def test_validate_reads_the_same_numbers(packed, packers, kind):
    """With one small matrix a kind, and without the settings' lists."""
    packing = packers.Packing(**KINDS[kind])
    made = packers.pack({"a.weight": torch.zeros(40, 96), "b.weight": torch.zeros(8, 32)}, packing, lambda name: True)
    ours = PublishedPacked(packing.config(), made.tensors.keys())
    for name, numbers in made.numbers.items():
        assert ours.has(name)
        assert torch.equal(ours.numbers(name, made.tensors.__getitem__), numbers)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("GPTQ, zero points", "bfloat16"), ("compressed-tensors, 8 bits", "float32")]
)
def test_validate_proves_a_bundle_against_its_checkpoint(packed, tmp_path, kind, dtype):
    checkpoint, _ = packed(kind, "v3", rope_interleave=False)
    assert export(checkpoint, "--dtype", dtype).exit_code == 0
    done = validate(tmp_path / "out")
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    assert brief["passed"] is True
    assert brief["narrowing"]["kl_mean"] == 0
    published = published_weights(Bundle.open(tmp_path / "out"), None)
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for name in tensors:
        if not name.endswith("_scale"):
            assert torch.equal(published(name), widened(tensors, name)), name


def test_validate_names_a_code_that_is_another(packed, tmp_path):
    """Another checkpoint of the same shapes: whose codes are others, however near."""
    checkpoint, result = packed("GPTQ", "v3")
    assert export(checkpoint).exit_code == 0
    result.tensors[f"{O_PROJ}.qweight"][0, 0] ^= 1
    save_file(result.tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    done = validate(tmp_path / "out", "--checkpoint", str(checkpoint))
    assert done.exit_code == 3, done.output
    assert "o_proj.weight is not the checkpoint's in a narrow format" in done.output


def validate(bundle: Path, *options: str) -> Any:
    given = ["validate", str(bundle), "--backend", "exported", "--threads", "1", "--json", *options]
    return CliRunner().invoke(main, given, catch_exceptions=False)


def test_transformers_is_refused_for_packed_checkpoints(packed, tmp_path):
    """Also where nothing of the bundle is narrow."""
    checkpoint, _ = packed("GPTQ", "v3", lambda module: "kv_b_proj" in module)
    assert export(checkpoint, "--dtype", "float32").exit_code == 0
    assert not Bundle.open(tmp_path / "out").manifest.is_narrow
    assert "weights are packed" in one_line(validate(tmp_path / "out", "--backend", "transformers"))
    assert validate(tmp_path / "out").exit_code == 0
