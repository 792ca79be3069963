"""Narrow bundles: the graphs beside torch with the same numbers, and what these cost beside the checkpoint's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

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


@pytest.mark.parametrize(("preset", "dtype"), [("int4", "bfloat16"), ("int8", "float16"), ("int4", "float32")])
def test_right_bundles_pass_and_say_what_they_cost(narrow, tmp_path, preset: str, dtype: str) -> None:
    done = validate(narrow(preset, dtype), "--report", tmp_path)
    assert done.exit_code == 0, done.output
    brief = json.loads(done.stdout)
    assert brief["passed"] is True
    cost = brief["narrowing"]
    assert cost["formats"] == sorted({preset, "int8"})
    assert 0 < cost["kl_mean"] < (0.2 if preset == "int4" else 0.01)
    assert 0.5 < cost["same_experts"] < 1
    assert cost["weight_bytes"] < cost["whole_bytes"]
    assert cost["perplexity_increase"] is None  # without a tokenizer
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["layer"] for layer in report["narrowing"]["layers"]] == [0, 1, 2]
    assert report["narrowing"]["layers"][0]["same_experts"] is None
    assert "What narrow weights cost" in (tmp_path / "report.html").read_text()
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
        ("int4", ["--backend", "kernels"], "the bundle has narrow weights, which it does not take"),
        ("int4", ["--backend", "tensorrt"], "the bundle has narrow weights, which it does not take"),
        ("int4", ["--backend", "transformers"], "the bundle has narrow weights, which it does not take"),
    ],
)
def test_what_cannot_be_is_refused_by_name(narrow, good, preset, options, words: str) -> None:
    bundle = narrow(preset, "float32") if preset else good("float32")
    done = validate(bundle, *options)
    assert done.exit_code == 1
    assert words in done.output


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
