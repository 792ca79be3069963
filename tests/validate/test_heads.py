"""validate over bundles that do not generate: every output has its tolerance, and an error is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from polygraphy.comparator import AccuracyResults
from safetensors.torch import save_file

from deepseek_trt.cli.main import main
from deepseek_trt.engines.sessions import graphs as graph_session
from deepseek_trt.engines.sessions.graphs import GRAPH_BACKENDS, OrtGraphs

LATENTS = [f"present.{layer}.latent" for layer in range(3)]
PAIRS = [f"present.{layer}.{name}" for layer in range(3) for name in ("key", "value")]
EXPORTS = {
    "features": (
        {"task": "feature-extraction", "hidden_states": True, "page_size": 16},
        ["last_hidden_state", *(f"hidden_states.{i}" for i in range(4)), *LATENTS],
    ),
    "whole": ({"task": "feature-extraction", "no_cache": True, "page_size": 16}, ["last_hidden_state"]),
    "classes": ({"task": "text-classification", "page_size": 16}, ["logits"]),
    "classes by mask": ({"task": "text-classification", "io": "transformers", "page_size": 16}, ["logits"]),
    "last logits": ({"logits_to_keep": 4, "inputs_embeds": True, "page_size": 16}, ["logits", *LATENTS]),
    "transformers": ({"io": "transformers", "page_size": 16}, ["logits", *PAIRS]),
}


@pytest.fixture(scope="module")
def checkpoint(small_v2, tmp_path_factory) -> Path:
    """The small model with both heads."""
    folder = Path(shutil.copytree(small_v2.checkpoint, tmp_path_factory.mktemp("heads") / "checkpoint"))
    score = torch.randn(3, small_v2.raw["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"score.weight": score}, folder / "score.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["score.weight"] = "score.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def validate():
    def run(bundle, *options):
        return CliRunner().invoke(main, ["validate", str(bundle.path), *map(str, options)])

    return run


@pytest.mark.parametrize("name", EXPORTS)
def test_every_output_is_reported_with_its_tolerance(checkpoint, bundle_of, validate, tmp_path, name):
    options, outputs = EXPORTS[name]
    result = validate(bundle_of(checkpoint, dtype="float32", **options), "--report", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    (backend,) = report["backends"]
    (brief,) = json.loads(result.stdout)["backends"]
    assert list(brief["outputs"]) == outputs
    assert [o["output"] for o in backend["outputs"]] == outputs
    assert all(o["passed"] and 0 <= o["max_relative"] <= o["tolerance"] < 3e-5 for o in backend["outputs"])
    assert bool(AccuracyResults.load(str(tmp_path / "ort.polygraphy.json")))
    page = (tmp_path / "report.html").read_text()
    assert "Passed" in page
    assert "predictions" not in result.output + page


def test_an_output_out_of_tolerance_is_named(checkpoint, bundle_of, validate, monkeypatch):
    class Wrong(OrtGraphs):
        def run(self, graph, feeds):
            out = super().run(graph, feeds)
            out["logits"][1] *= 1.01
            return out

    monkeypatch.setitem(GRAPH_BACKENDS, "ort", Wrong)
    options, _ = EXPORTS["classes"]
    result = validate(bundle_of(checkpoint, dtype="float32", **options))
    assert result.exit_code == 3
    assert "logits" in result.stdout
    assert "row 1" in " ".join(result.stdout.split())
    assert result.stdout.rstrip().endswith("failed")


def test_narrow_weights_are_computed_as_the_report_says(checkpoint, bundle_of, validate):
    result = validate(bundle_of(checkpoint, dtype="bfloat16", **EXPORTS["classes"][0]), "--backend", "ort")
    assert result.exit_code == 0, result.output
    assert "bfloat16 weights, computed in float32" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--backend", "tensorrt"),
            "backend 'tensorrt' does not run a bundle for text-classification; use: ort, torch",
        ),
        (("--bisect",), "--bisect is for bundles that generate"),
    ],
)
def test_what_these_bundles_do_not_take(checkpoint, bundle_of, validate, options, words):
    result = validate(bundle_of(checkpoint, dtype="float32", **EXPORTS["classes"][0]), *options)
    assert result.exit_code == 1
    assert words in result.stderr


def test_the_torch_backend_is_the_reference_itself(checkpoint, bundle_of, validate):
    assert graph_session.GRAPH_BACKENDS.keys() == {"ort", "torch"}
    result = validate(bundle_of(checkpoint, dtype="float32", **EXPORTS["classes"][0]), "--backend", "torch", "--json")
    assert json.loads(result.stdout)["backends"][0]["outputs"]["logits"]["max_relative"] == 0.0
