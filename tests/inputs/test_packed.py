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


@pytest.mark.parametrize("base", ["v2", "v3"])
@pytest.mark.parametrize("kind", KINDS)
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
    empty = {name: np.zeros([sizes.get(d, 4) if isinstance(d, str) else d for d in t.dims]) for name, t in inputs.items()}
    given = {name: known.get(name, empty[name]).astype(t.dtype) for name, t in inputs.items()}
    ours, theirs = (OrtGraphs(bundle).run("prefill", given)["logits"] for bundle in bundles)
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
