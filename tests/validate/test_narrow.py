"""Narrow bundles: the graphs beside torch with the same numbers, and what these cost beside the checkpoint's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.export.bundle.folder import MANIFEST_FILE, WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.manifest import sha256_of
from deepseek_trt.export.reading.header import read_header

pytestmark = pytest.mark.usefixtures("little_greed")
STACK = "model.layers.1.mlp.experts.up_proj"
PAGE = 8


@pytest.fixture(scope="session")
def narrow(small_v2, bundle_of):
    """A right bundle of a preset and a dtype."""
    return lambda preset, dtype: bundle_of(small_v2.checkpoint, dtype=dtype, page_size=PAGE, quantize=preset)


def validate(bundle: Bundle | Path, *args: Any) -> Any:
    path = bundle if isinstance(bundle, Path) else bundle.path
    given = ["validate", str(path), "--backend", "exported", "--threads", "1", "--json", *map(str, args)]
    return CliRunner().invoke(main, given, catch_exceptions=False)


@pytest.mark.parametrize(
    ("preset", "dtype"), [("int4", "bfloat16"), ("int8", "float16"), ("int4", "float32"), ("fp8", "bfloat16")]
)
def test_right_bundles_pass_and_say_what_they_cost(narrow, tmp_path, preset: str, dtype: str) -> None:
    done = validate(narrow(preset, dtype), "--report", tmp_path)
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    assert brief["passed"] is True
    cost = brief["narrowing"]
    assert cost["formats"] == ([preset] if preset == "fp8" else sorted({preset, "int8"}))
    assert 0 < cost["kl_mean"] < (0.01 if preset == "int8" else 0.2)
    assert 0.5 < cost["same_experts"] < 1
    assert cost["weight_bytes"] < cost["whole_bytes"]
    assert cost["perplexity_increase"] is None  # without a tokenizer
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["layer"] for layer in report["narrowing"]["layers"]] == [0, 1, 2]
    assert report["narrowing"]["layers"][0]["same_experts"] is None
    assert "What narrow numbers cost" in (tmp_path / "report.html").read_text()
    if dtype != "float16":
        assert brief["backends"][0]["outputs"]["logits"]["tolerance"] < 1e-4


def test_compiled_operators_meet_a_tolerance_that_knows_how_they_round(narrow) -> None:
    """Where they take narrow weights; graphs that they leave as exported meet float32's."""
    done = validate(narrow("int4", "bfloat16"), "--backend", "ort")
    assert done.exit_code == 0, done.output
    exported, compiled = json.loads(done.stdout)["backends"]
    assert exported["outputs"]["logits"]["tolerance"] < 1e-4
    assert compiled["outputs"]["logits"]["tolerance"] < 1e-3


def test_limits_judge_the_cost(narrow) -> None:
    bundle = narrow("int4", "float32")
    assert validate(bundle, "--max-kl", "0.5").exit_code == 0
    done = validate(bundle, "--max-kl", "1e-7")
    assert done.exit_code == 3
    brief = json.loads(done.stdout)
    assert brief["passed"] is True
    (line,) = brief["narrowing"]["too_much"]
    assert line.startswith("KL ")
    assert line.endswith("--max-kl 1e-07")


@pytest.mark.parametrize(
    ("preset", "options", "words"),
    [
        (None, ["--max-kl", "1"], "has no narrow weights, which cost nothing"),
        ("int4", ["--max-kl", "1", "--layers", "0"], "--layers compares parts of the model"),
        ("int4", ["--max-perplexity-increase", "1"], "has no tokenizer.json, so that no text is scored"),
        ("int4", ["--backend", "transformers"], "the bundle has narrow weights, which it does not take"),
    ],
)
def test_what_cannot_be_is_refused_by_name(narrow, good, preset, options, words: str) -> None:
    bundle = narrow(preset, "float32") if preset else good("float32")
    done = validate(bundle, *options)
    assert done.exit_code == 1
    assert words in done.output


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int8", "int4", "fp8"])
def test_kernels_pass(narrow, preset: str) -> None:
    """What plugins compute, interpreted: judged as every backend."""
    done = validate(narrow(preset, "float32"), "--backend", "kernels")
    assert done.exit_code == 0, done.output


def changed(bundle: Bundle, into: Path, name: str, change: Any) -> Path:
    """A copy in which a tensor's bytes are others, listed as if export had written them."""
    shutil.copytree(bundle.path, into)
    place = {t.name: t for t in read_header(into / WEIGHTS_FILE)}[name]
    data = np.memmap(into / WEIGHTS_FILE, dtype=np.uint8, mode="r+")[place.offset : place.offset + place.nbytes]
    data[:] = change(np.array(data).reshape(*place.shape[:-1], -1)).reshape(-1)
    raw = json.loads((into / MANIFEST_FILE).read_text())
    (record,) = (w for w in raw["weights"] if w["recipe"]["name"] == name)
    record["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
    del raw["sha256"]
    (into / MANIFEST_FILE).write_text(json.dumps({**raw, "sha256": sha256_of(raw)}))
    return into


FAULTS = {
    "experts in another order": (STACK, lambda codes: codes[::-1]),
    "halves of bytes exchanged": (STACK, lambda codes: (codes >> 4) | (codes << 4)),
    "rows of a linear layer": ("model.layers.0.self_attn.o_proj.weight", lambda codes: codes[::-1]),
    "scales of another expert": (f"{STACK}_scale", lambda scales: scales * 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_codes_that_are_not_the_checkpoints_fail_by_name(narrow, tmp_path, fault: str) -> None:
    """Graphs and reference then compute the same, from the same wrong numbers."""
    name, change = FAULTS[fault]
    done = validate(changed(narrow("int4", "float32"), tmp_path / "wrong", name, change))
    assert done.exit_code == 3, done.output
    weight = name.removesuffix("_scale")
    assert any(weight in sentence for sentence in json.loads(done.stdout)["odd_weights"])


def test_layers_are_compared_one_at_a_time(narrow, tmp_path) -> None:
    done = validate(narrow("int4", "bfloat16"), "--layers", "0-1", "--backend", "torch")
    assert done.exit_code == 0, done.output
    assert [b["passed"] for b in json.loads(done.stdout)["backends"]] == [True, True]
    name, change = FAULTS["experts in another order"]
    wrong = changed(narrow("int4", "bfloat16"), tmp_path / "wrong", name, change)
    assert validate(wrong, "--layers", "1").exit_code == 3


# fp8

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="session")
def kept(small_v2, bundle_of, tmp_path_factory):
    """A right bundle of a checkpoint in fp8 whose codes are kept, in bfloat16."""
    folder = tmp_path_factory.mktemp("kept") / "checkpoint"
    folder.mkdir()
    tensors = {}
    for file in sorted(small_v2.checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor
            if name.endswith("_proj.weight"):
                scale = tensor.abs().max().float() / 300
                tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                blocks = [-(-size // 128) for size in tensor.shape]
                tensors[f"{name}_scale_inv"] = torch.full(blocks, scale.item())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    raw = {**small_v2.raw, "torch_dtype": "bfloat16", "quantization_config": fp8}
    (folder / "config.json").write_text(json.dumps(raw))
    return bundle_of(folder, dtype="bfloat16", page_size=PAGE, quantize="keep")


def test_kept_codes_are_the_published_numbers(kept, tmp_path) -> None:
    """They cost what rounding the dequantised ones to bfloat16 would; compiled operators meet float32's tolerance."""
    done = validate(kept, "--backend", "ort", "--report", tmp_path)
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    assert brief["narrowing"]["formats"] == ["fp8"]
    cost = brief["narrowing"]
    assert cost["same_experts"] > 0.99
    # One of them has another expert where two score alike, which costs more than all others together.
    assert 0 <= cost["kl_mean"] - cost["kl_max"] / cost["predictions"] < 1e-3
    for backend in brief["backends"]:
        assert backend["outputs"]["logits"]["tolerance"] < 1e-4
    assert json.loads((tmp_path / "report.json").read_text())["independent"]["status"] in ("agrees", "absent")


def one_bit(codes: Any) -> Any:
    codes[-1, -1] ^= 1
    return codes


@pytest.mark.parametrize(("name", "change"), [(O_PROJ, one_bit), (f"{O_PROJ}_scale", one_bit)])
def test_a_bit_of_a_kept_weight_fails_by_name(kept, tmp_path, name: str, change: Any) -> None:
    done = validate(changed(kept, tmp_path / "wrong", name, change), "--backend", "torch")
    assert done.exit_code == 3, done.output
    assert any(O_PROJ in sentence for sentence in json.loads(done.stdout)["odd_weights"])


FP8_FAULTS = {
    "experts in another order": (STACK, lambda codes: codes[::-1]),
    "a number that is NaN": (O_PROJ, lambda codes: codes | (np.arange(codes.size).reshape(codes.shape) == 5) * 0x7F),
    "a number one step off": (O_PROJ, lambda codes: codes ^ (np.arange(codes.size).reshape(codes.shape) == 5) * 2),
    "scales of 0": (f"{STACK}_scale", lambda scales: scales * 0),
    "a sign": (O_PROJ, lambda codes: codes ^ 0x80),
}


@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_fp8_that_is_not_the_checkpoints_fails_by_name(narrow, tmp_path, fault: str) -> None:
    name, change = FP8_FAULTS[fault]
    done = validate(changed(narrow("fp8", "bfloat16"), tmp_path / "wrong", name, change), "--layers", "0-1")
    assert done.exit_code == 3, done.output
    weight = name.removesuffix("_scale")
    assert any(weight in sentence for sentence in json.loads(done.stdout)["odd_weights"])
