"""Checkpoints that are published packed are taken as they are: each number of the bundle is the packed one, bit by bit.

The packers and the numbers that they pack are packers.py's, of the writers' descriptions.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.engines.sessions.graphs import OrtGraphs
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.packed import unpack

NAMES = (
    "compressed-tensors",
    "compressed-tensors, groups of 64",
    "compressed-tensors, rows",
    "compressed-tensors, zero points",
    "compressed-tensors, 8 bits",
    "compressed-tensors, a code a byte",
    "compressed-tensors, a code a byte, zero points",
    "GPTQ",
    "GPTQ, zero points",
    "GPTQ, 8 bits",
    "GPTQ, second format",
    "GPTQ, rows",
    "AWQ",
    "AWQ, groups of 64",
)
LAYER = "model.layers.1.mlp.experts"


def test_all_kinds_are_tried(packers):
    assert tuple(packers.KINDS) == NAMES


@pytest.mark.parametrize(
    ("kind", "base"),
    [(kind, "v3") for kind in NAMES] + [(kind, "v2") for kind in ("compressed-tensors", "GPTQ", "AWQ")],
)
def test_every_number_is_the_packed_one(packed, verdict, packers, kind, base):
    checkpoint, result = packed(kind, base)
    found = verdict(checkpoint)
    assert found.accepted, found.export
    tensors = packers.check_equal(found.bundle, checkpoint, result)
    packing = packers.Packing(**packers.KINDS[kind])
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
def test_rows_are_put_in_the_order_of_the_graphs(packed, made, verdict, kind, rope, packers):
    """Where rope rotates halves, rows are paired; the whole checkpoint of the same numbers shows which."""
    checkpoint, result = packed(kind, "v3", rope_interleave=rope)
    tensors = load_file(verdict(checkpoint).bundle / WEIGHTS_FILE)
    whole = made("v3", name="whole", **packers.SIZES, rope_interleave=rope)
    save_file(result.numbers | _whole(result), whole.path / "model.safetensors")
    others = load_file(verdict(whole.path).bundle / WEIGHTS_FILE)
    assert not [name for name in others if not torch.equal(packers.widened(tensors, name), others[name])]


def _whole(result: Any) -> dict[str, torch.Tensor]:
    endings = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape")
    return {name: t for name, t in result.tensors.items() if not name.endswith(tuple(f".{e}" for e in endings))}


@pytest.mark.parametrize("kind", ["compressed-tensors, zero points", "GPTQ", "GPTQ, zero points", "AWQ"])
def test_a_few_rows_at_a_time_are_the_same(packed, verdict, monkeypatch, kind, packers):
    """Large matrices are unpacked in blocks of rows, which some layouts store as columns."""
    monkeypatch.setattr(unpack, "_BLOCK", 700)
    checkpoint, result = packed(kind, "v3", lambda m: packers.linear(m) or "kv_b_proj" in m)
    packers.check_equal(verdict(checkpoint, "--dtype", "float32").bundle, checkpoint, result)


@pytest.mark.parametrize("kind", ["compressed-tensors, groups of 64", "GPTQ, zero points", "AWQ", "GPTQ, 8 bits"])
def test_graphs_compute_what_the_whole_numbers_do(packed, made, verdict, kind, packers):
    checkpoint, result = packed(kind, "v3", attention_bias=True)
    whole = made("v3", name="whole", **packers.SIZES, attention_bias=True)
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


@pytest.mark.parametrize("other", ["8 bits", "zero points"])
def test_experts_of_several_kinds_become_int8(made, packers, tmp_path, other, exported):
    """Two groups of modules, the second of one expert's projection: the layer's stacks are of one format."""
    first = packers.Packing("compressed")
    second = packers.Packing("compressed", 8 if other == "8 bits" else 4, 64, other == "8 bits", torch.bfloat16, 1)
    groups = {"a": first.config()["config_groups"]["group_0"], "b": second.config()["config_groups"]["group_0"]}
    groups["b"]["targets"] = [r"re:.*experts\.2\.up_proj"]
    one = made("v3", **packers.SIZES, quantization_config=first.config(config_groups=groups))
    particular = f"{LAYER}.2.up_proj"
    result = packers.pack(one.tensors, first, lambda m: packers.linear(m) and m != particular)
    more = packers.pack({f"{particular}.weight": one.tensors[f"{particular}.weight"]}, second, lambda m: True)
    result.tensors.pop(f"{particular}.weight")
    result.tensors.update(more.tensors)
    result.numbers.update(more.numbers)
    save_file(result.tensors, one.path / "model.safetensors")
    done = exported(one.path)
    assert done.exit_code == 0, done.output
    tensors = packers.check_equal(tmp_path / "out", one.path, result)
    assert {tensors[f"{LAYER}.{s}_proj"].dtype for s in ("gate", "up", "down")} == {torch.int8}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert "3 weights of 4 bits are stored in 8" in done.output


@pytest.mark.parametrize("whole", [f"{LAYER}.1.up_proj", f"{LAYER}.gate_proj"])
def test_experts_of_which_some_are_whole_are_refused(packed, verdict, whole, packers):
    """One expert's projection, or one projection of all."""
    stack = whole.rpartition(".")[2]
    ours = (lambda m: m == whole) if whole[-11:-10].isdigit() else (lambda m: LAYER in m and m.endswith(stack))
    found = verdict(packed("compressed-tensors", "v3", lambda m: packers.linear(m) and not ours(m))[0])
    assert not found.accepted
    for text in (found.check, found.export):
        assert "an op takes the experts of a layer together" in text.replace("\n", " ")


@pytest.mark.parametrize("kind", ["compressed-tensors", "GPTQ, zero points", "AWQ"])
def test_what_graphs_take_whole_becomes_whole(packed, verdict, kind, packers):
    """kv_b_proj, embeddings, the router, and rows that hold no groups of 32."""

    def wanted(module: str) -> bool:
        return "_proj" in module or module.endswith(("embed_tokens", "mlp.gate", "lm_head"))

    checkpoint, result = packed(
        kind, "v3", wanted, {"ignore": []} if "comp" in kind else None, q_lora_rank=24, n_routed_experts=8
    )
    found = verdict(checkpoint, "--dtype", "float32")
    tensors = packers.check_equal(found.bundle, checkpoint, result)
    whole = {name for name in tensors if f"{name}_scale" not in tensors and tensors[name].dim() > 1}
    layers = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("w_uk", "w_uv", "q_b_proj.weight")]
    assert {name for name in whole if not name.endswith("_scale")} == {
        *layers,
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight",
    }
    assert "8 packed weights are stored as whole numbers" in found.export.replace("\n", " ")


def test_whole_numbers_are_rounded_once(packed, verdict, packers):
    checkpoint, result = packed("AWQ", "v2", lambda m: packers.linear(m) or "kv_b_proj" in m)
    found = verdict(checkpoint, "--dtype", "bfloat16")
    tensors, raw = load_file(found.bundle / WEIGHTS_FILE), json.loads((checkpoint / "config.json").read_text())
    for half in ("w_uk", "w_uv"):
        name = f"model.layers.0.self_attn.{half}"
        assert torch.equal(tensors[name], packers.expected(result.numbers, name, raw).bfloat16())


@pytest.mark.parametrize(
    ("kind", "settings", "wanted", "words"),
    [
        ("AWQ", {"modules_to_not_convert": ["o_proj"]}, None, ["says that 2 modules are whole, and they are packed"]),
        ("AWQ", {"modules_to_not_convert": None}, None, ["2 modules are whole, and", "kv_b_proj"]),
        ("compressed-tensors", {"ignore": ["re:.*kv_b.*"]}, None, ["1 modules are whole, and", "lm_head"]),
        ("compressed-tensors", {"ignore": ["lm_head", "re:.*kv_b.*", "re:.*o_proj$"]}, None, ["2 modules are whole"]),
        ("GPTQ", {"dynamic": {"-:.*kv_b_proj": {}}}, None, []),
        ("GPTQ", {"dynamic": {"-:.*(kv_b|up)_proj": {}}}, None, ["6 modules are whole, and they are packed"]),
        ("GPTQ", {"modules_in_block_to_quantize": [["self_attn.o_proj"]]}, None, ["modules are packed that"]),
        ("GPTQ", {"modules_in_block_to_quantize": ["self_attn.o_proj"]}, lambda m: "o_proj" in m, []),
    ],
    ids=lambda value: "of o_proj alone" if callable(value) else str(value),
)
def test_lists_of_modules_that_the_tensors_contradict_are_named(
    packed, verdict, kind, settings, wanted, words, packers
):
    checkpoint, result = packed(kind, "v3", wanted, settings)
    found = verdict(checkpoint)
    packers.check_equal(found.bundle, checkpoint, result)
    for text in (found.check, found.export):
        text = " ".join(text.split())
        assert all(word in text for word in words), text
        assert words or not ("modules are whole" in text or "modules are packed" in text)


# Files beside the weights, and names


SIDE = {"GPTQ": "quantize_config.json", "AWQ": "quant_config.json"}


@pytest.mark.parametrize("kind", SIDE)
def test_a_side_file_that_says_the_same(packed, verdict, kind, packers):
    checkpoint, result = packed(kind)
    settings = {"GPTQ": {"bits": 4, "group_size": 32, "desc_act": False}, "AWQ": {"w_bit": 4, "version": "GEMM"}}[kind]
    (checkpoint / SIDE[kind]).write_text(json.dumps({**settings, "damp_percent": 0.1}))
    packers.check_equal(verdict(checkpoint).bundle, checkpoint, result)


@pytest.mark.parametrize("kind", SIDE)
def test_a_side_file_that_says_another_thing(packed, verdict, kind):
    checkpoint, _ = packed(kind)
    (checkpoint / SIDE[kind]).write_text(json.dumps({"group_size": 128, "q_group_size": 128}))
    found = verdict(checkpoint)
    assert not found.accepted
    assert "says group_size 128, and config.json's quantization_config 32" in " ".join(found.check.split())


def test_names_with_a_prefix_and_shards(packed, verdict, packers):
    checkpoint, result = packed("compressed-tensors", "v3")
    tensors = {f"module.{name}": tensor for name, tensor in result.tensors.items()}
    names = sorted(tensors)
    (checkpoint / "model.safetensors").unlink()
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, checkpoint / file)
    index = {name: file for file, mine in shards.items() for name in mine}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    packers.check_equal(verdict(checkpoint).bundle, checkpoint, result)
