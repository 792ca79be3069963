"""validate reads packed checkpoints by code of its own, and proves bundles against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deepseek_trt.cli.main import main
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.validate.backends.published_packed import PublishedPacked
from deepseek_trt.validate.backends.published_weights import published_weights

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
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("kind", NAMES)
def test_validate_reads_the_same_numbers(packed, packers, kind):
    """With one small matrix a kind, and without the settings' lists."""
    packing = packers.Packing(**packers.KINDS[kind])
    made = packers.pack({"a.weight": torch.zeros(40, 96), "b.weight": torch.zeros(8, 32)}, packing, lambda name: True)
    ours = PublishedPacked(packing.config(), made.tensors.keys())
    for name, numbers in made.numbers.items():
        assert ours.has(name)
        assert torch.equal(ours.numbers(name, made.tensors.__getitem__), numbers)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("GPTQ, zero points", "bfloat16"), ("compressed-tensors, 8 bits", "float32")]
)
def test_validate_proves_a_bundle_against_its_checkpoint(packed, tmp_path, kind, dtype, packers, exported):
    checkpoint, _ = packed(kind, "v3", rope_interleave=False)
    assert exported(checkpoint, "--dtype", dtype).exit_code == 0
    done = validate(tmp_path / "out")
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    assert brief["passed"] is True
    assert brief["narrowing"]["kl_mean"] == 0
    published = published_weights(Bundle.open(tmp_path / "out"), None)
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for name in tensors:
        if not name.endswith("_scale"):
            assert torch.equal(published(name), packers.widened(tensors, name)), name


def test_validate_names_a_code_that_is_another(packed, tmp_path, exported):
    """Another checkpoint of the same shapes: whose codes are others, however near."""
    checkpoint, result = packed("GPTQ", "v3")
    assert exported(checkpoint).exit_code == 0
    result.tensors[f"{O_PROJ}.qweight"][0, 0] ^= 1
    save_file(result.tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    done = validate(tmp_path / "out", "--checkpoint", str(checkpoint))
    assert done.exit_code == 3, done.output
    assert "o_proj.weight is not the checkpoint's in a narrow format" in done.output


def validate(bundle: Path, *options: str) -> Any:
    given = ["validate", str(bundle), "--backend", "exported", "--threads", "1", "--json", *options]
    return CliRunner().invoke(main, given, catch_exceptions=False)


def test_transformers_is_refused_for_packed_checkpoints(packed, tmp_path, exported):
    """Also where nothing of the bundle is narrow."""
    checkpoint, _ = packed("GPTQ", "v3", lambda module: "kv_b_proj" in module)
    assert exported(checkpoint, "--dtype", "float32").exit_code == 0
    assert not Bundle.open(tmp_path / "out").manifest.is_narrow
    done = validate(tmp_path / "out", "--backend", "transformers")
    assert done.exit_code == 1
    assert "error: " in done.output
    assert "weights are packed" in done.output
    assert validate(tmp_path / "out").exit_code == 0
