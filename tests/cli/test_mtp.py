"""A checkpoint with a layer of multi-token prediction, from export to answers, by the commands."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main

PROMPTS = ("--token-ids", "5,9,17,3", "--token-ids", "40,41,42,43,44,45,46,47,48")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture(scope="module")
def bundle(mtp_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("mtp") / "bundle"
    facts = json.loads(run("export", mtp_checkpoint(0.3), out, "--mtp", "--dtype", "float32", "--json"))
    assert facts["fresh"] is True
    return out


def test_validate_covers_the_layer(bundle, tmp_path):
    report = tmp_path / "report"
    brief = json.loads(run("validate", bundle, "--no-independent", "--threads", 1, "--report", report, "--json"))
    assert brief["passed"] is True
    for backend in brief["backends"]:
        names = set(backend["outputs"])
        assert {"last_hidden_state", "draft_logits", "draft_hidden_state", "draft_latents.0"} <= names, backend
        assert all(output["reason"] == "" for output in backend["outputs"].values())
    assert (report / "ort-mtp.polygraphy.json").is_file()


@pytest.mark.parametrize("sampling", [("--greedy",), ("--temperature", "0.8", "--seed", "4")])
def test_answers_are_those_without(bundle, sampling):
    common = ("generate", bundle, *PROMPTS, "--max-new-tokens", 48, "--threads", 1, "--json", *sampling)
    plain, drafted = (run(*common, "--speculate", way) for way in ("off", "mtp"))
    assert drafted == plain


def test_bench_shows_acceptance(bundle):
    common = ("bench", bundle, "--context", 16, "--new-tokens", 24, "--threads", 1, "--json", "--speculate", "mtp")
    (point,) = json.loads(run(*common))["points"]
    assert 0 < point["acceptance"] <= 1
    assert point["tokens_a_step"] > 1


def test_engines_are_refused(bundle):
    assert "exported with --mtp" in run("build", bundle, "--sm", 86, code=1)


def test_repository_carries_the_layer(bundle, tmp_path, demo_checkpoint, relist):
    """Its graph for the compiled operators, and the way to speculate in the parameters."""
    from deepseek_trt.export.text.files import TOKENIZER

    for name in (TOKENIZER, "tokenizer_config.json"):
        (bundle / name).write_bytes((demo_checkpoint / name).read_bytes())
    relist(bundle)
    run("model-repository", bundle, tmp_path / "repository", "--backend", "ort", "--speculate", "mtp")
    placed = {file.name for file in (tmp_path / "repository").rglob("*.onnx")}
    assert {"mtp.onnx", "mtp.cpu.onnx", "decode.cpu.onnx"} <= placed
    (config,) = (file for file in (tmp_path / "repository").rglob("config.pbtxt") if "mtp" in file.read_text())
    assert "speculate" in config.read_text()
