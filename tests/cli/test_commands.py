"""The command line: output, exit codes, and errors in one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main


@pytest.fixture
def run():
    def invoke(*arguments: object):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return invoke


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of) -> Path:
    return bundle_of(demo_checkpoint).path


def test_export_says_what_it_wrote_and_then_that_nothing_is_to_do(run, small_v2, tmp_path):
    out = tmp_path / "out"
    first = run("export", small_v2.checkpoint, out, "--dtype", "float32", "--json")
    assert first.exit_code == 0, first.output
    facts = json.loads(first.stdout)
    assert facts["fresh"] is True
    assert facts["dtype"] == "float32"
    assert "note: the checkpoint has no tokenizer.json" in first.stderr
    again = run("export", small_v2.checkpoint, out, "--dtype", "float32")
    assert again.stdout.startswith("nothing to do, same inputs as")


def test_generate_streams_text(run, demo):
    result = run("generate", demo, "--prompt", "Return the number of", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert result.stderr.startswith("backend: ort (bfloat16 weights, computed in float32")
    assert re.fullmatch(r"8 tokens, [\d.]+ tokens/s, first after [\d.]+ s", result.stderr.splitlines()[1])


def test_generate_as_json(run, demo):
    prompts = ("--prompt", "Return", "--prompt", "The number of")
    result = run("generate", demo, *prompts, "--max-new-tokens", 4, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(line["token_ids"]) <= 4 for line in lines] == [True, True]
    assert set(lines[0]) == {"prompt_ids", "token_ids", "finish_reason", "text"}


def test_every_sampling_option_reaches_the_sampler():
    from deepseek_trt.cli.options import sampling_options
    from deepseek_trt.engines.generation.params import SamplingParams

    params = SamplingParams(9, 0.5, 4, 0.9, 3, 0.1, 1.2, 0.3, 0.4, ("x", "y"), (5, 6), True, 2, 3)
    seen = []
    command = click.command()(sampling_options(lambda params: seen.append(params)))
    arguments = []
    for field in dataclasses.fields(params):
        if field.name in ("logit_bias", "guide"):  # of Python and servers alone
            continue
        option = "--stop-token-id" if field.name == "stop_token_ids" else "--" + field.name.replace("_", "-")
        value = getattr(params, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [option] if one is True else [option, str(one)]
    CliRunner().invoke(command, arguments, catch_exceptions=False)
    CliRunner().invoke(command, [], catch_exceptions=False)
    assert seen == [params, SamplingParams()]


def test_generate_holds_back_what_may_be_a_stop(run, demo):
    whole = run("generate", demo, "--prompt", "The number of", "--max-new-tokens", 12).stdout
    stop = whole[4:9]
    cut = run("generate", demo, "--prompt", "The number of", "--max-new-tokens", 12, "--stop", "none", "--stop", stop)
    assert cut.stdout == whole[: whole.index(stop)] + "\n"


def test_generate_gives_logprobs_as_json(run, demo):
    arguments = ("generate", demo, "--prompt", "The number of", "--max-new-tokens", 3, "--logprobs", 2)
    facts = json.loads(run(*arguments, "--json").stdout)
    assert [len(top) for top in facts["top_logprobs"]] == [2, 2, 2]
    assert facts["logprobs"] == [top[0][1] for top in facts["top_logprobs"]]
    refused = run(*arguments)
    assert (refused.exit_code, "with --json only" in refused.stderr) == (2, True)


def test_generate_from_token_ids(run, small_v2, bundle_of):
    bundle = bundle_of(small_v2.checkpoint).path
    result = run("generate", bundle, "--token-ids", "5,6,7", "--max-new-tokens", 3, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] is None
    assert "give token ids" in run("generate", bundle, "--prompt", "hi").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "BUNDLE"], 2, "give either --prompt or --token-ids"),
        (["generate", "BUNDLE", "--prompt", "x", "--token-ids", "1"], 2, "either"),
        (["generate", "BUNDLE", "--token-ids", "1,b"], 1, "numbers with commas"),
        (["generate", "BUNDLE", "--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "/nowhere", "--prompt", "x"], 1, "is not a bundle"),
        (["export", "/nowhere", "OUT"], 1, "is not a folder"),
        (["export", "CHECKPOINT", "BUNDLE", "--dtype", "float16"], 1, "is not empty"),
        (["export", "CHECKPOINT", "OUT", "--dtype", "int8"], 2, "int8"),
        (["unheard-of"], 2, "No such command"),
    ],
)
def test_mistakes(run, demo, demo_checkpoint, tmp_path, arguments, code, words):
    places = {"BUNDLE": demo, "CHECKPOINT": demo_checkpoint, "OUT": tmp_path / "out"}
    result = run(*(places.get(a, a) for a in arguments))
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_version(run):
    assert run("--version").output.startswith("deepseek-trt, version ") or "version" in run("--version").output
