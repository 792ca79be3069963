"""generation_config.json: where answers end, and defaults of sampling, in every way to run a bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.cli.options import sampling_options
from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.opening import open_llm
from deepseek_trt.engines.serving.request import parse_request
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BundleError, ConfigError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.text.generation_config import GenerationConfig
from deepseek_trt.export.text.reading import read_text

PROMPT = [3, 4, 5]
V3 = {"_from_model_config": True, "bos_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.95}


def write(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return folder


def ends(folder, raw, generation, vocab_size=48):
    config = ModelConfig.from_hf({"vocab_size": vocab_size, **raw})
    ended, notes = read_text(write(folder, generation), raw, config)
    return ended.eos_token_ids, notes


@pytest.mark.parametrize(
    ("raw", "generation", "ids"),
    [
        ({"eos_token_id": 1}, {"eos_token_id": 1}, (1,)),
        (
            {"eos_token_id": 1},
            {"eos_token_id": [1, 7]},
            (1, 7),
        ),  # Kimi's and others': the end of a turn beside that of a text
        ({"eos_token_id": 1}, {"eos_token_id": 7}, (1, 7)),  # vLLM takes both; transformers 7 alone
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [2, 3]}, (1, 2, 3)),
        ({"eos_token_id": 1}, {}, (1,)),
        ({"eos_token_id": 1}, {"eos_token_id": None}, (1,)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, (5,)),
        ({}, {"eos_token_id": 5}, (5,)),  # not the default of an absent key beside it
        ({}, {}, (2,)),  # transformers' default of the family
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_where_answers_end(tmp_path, raw, generation, ids):
    found, notes = ends(tmp_path, raw, generation)
    assert found == ids
    differ = raw.get("eos_token_id") and generation.get("eos_token_id") and len(ids) > 1 and raw != generation
    assert bool(differ) == any("answers end with the eos_token_id of config.json" in note for note in notes)


def test_the_tokenizers_end_where_no_config_names_one(tmp_path, demo_checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint / name, tmp_path / name)
    found, notes = ends(tmp_path, {}, {}, vocab_size=4096)
    assert found == (1,)
    assert any("the tokenizer's eos_token '<｜end▁of▁sentence｜>' (1)" in note for note in notes)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("value", "words"), [(48, "token ids end at 47"), (-1, "token ids end at 47")])
def test_ids_outside_the_vocabulary(made, verdict, file, value, words):
    ours = made("v2", eos_token_id=value if file == "config.json" else 1)
    write(ours.path, {"eos_token_id": value if file != "config.json" else 1})
    judged = verdict(ours.path)
    assert not judged.accepted
    for said in (judged.check, judged.export):
        assert "eos_token_id" in said
        assert (words if value > 0 or file != "config.json" else "is -1, where a whole number from 0") in said
        assert file in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "does not hold an object"),
        ('{"temperature": NaN}', "NaN"),
        ('{"temperature": Infinity}', "Infinity"),
        ({"eos_token_id": "1"}, "eos_token_id '1'"),
        ({"eos_token_id": True}, "eos_token_id True"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id"),
        ({"do_sample": "yes"}, "do_sample 'yes'"),
        ({"temperature": "hot"}, "temperature 'hot'"),
        ({"temperature": [0.5]}, "temperature"),
        ({"top_k": 1.5}, "top_k 1.5"),
        ({"top_p": True}, "top_p True"),
        ('{"top_p": 1' + "0" * 400 + "}", "top_p"),
    ],
)
def test_wrong_types_name_file_and_key(tmp_path, content, words):
    with pytest.raises(ConfigError, match=words) as caught:
        GenerationConfig.read(write(tmp_path, content))
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({}, {}),
        (V3, {"temperature": 0.6, "top_p": 0.95}),
        ({"temperature": 0.3}, {"temperature": 0.3}),  # vLLM's rule: do_sample need not be said
        ({"do_sample": False, "temperature": 0.3, "top_p": 0.9}, {}),  # transformers' rule: said, it is greedy
        ({"do_sample": False, "top_k": 4, "max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"do_sample": True}, {"temperature": 1.0}),  # the model's own distribution
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"top_k": 50.0, "min_p": 0.1}, {"top_k": 50, "min_p": 0.1}),
        ({"temperature": None}, {}),
    ],
)
def test_which_values_are_defaults(tmp_path, content, values):
    defaults = SamplingDefaults.of(write(tmp_path, content))
    assert defaults.params() == SamplingParams(**values)
    assert defaults.params(temperature=0.1, max_new_tokens=3).temperature == 0.1
    assert bool(defaults.lines) == bool(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
    ],
)
def test_values_out_of_range_name_file_and_key(tmp_path, key, value):
    with pytest.raises(BundleError, match=rf"generation_config.json: {key} .*--no-generation-config"):
        SamplingDefaults.of(write(tmp_path, {key: value}))


@pytest.mark.parametrize(
    "named",
    [
        {"num_beams": 4},
        {"penalty_alpha": 0.6},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[1]]},
        {"suppress_tokens": [1]},
        {"forced_bos_token_id": 3},
        {"forced_eos_token_id": 3},
        {"typical_p": 0.5},
        {"guidance_scale": 2.0},
        {"stop_strings": ["x"]},
        {"min_new_tokens": 4},
        {"max_length": 4096},
        {"sequence_bias": {"1": 2}},
        {"of_tomorrow": 1},
    ],
    ids=str,
)
def test_what_is_not_honoured_is_named(tmp_path, named):
    ((key, value),) = named.items()
    defaults = SamplingDefaults.of(write(tmp_path, named))
    assert defaults.lines == (f"generation_config.json: {key} {value!r} is not honoured",)
    _, notes = read_text(tmp_path, {"eos_token_id": 1}, ModelConfig(eos_token_ids=(1,)))
    assert defaults.lines[0] in notes


def test_what_changes_nothing_is_not_named(tmp_path):
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "max_length": 20, "suppress_tokens": None}
    neutral |= {"transformers_version": "4.46.3", "pad_token_id": 3, "use_cache": True, "_from_model_config": True}
    assert SamplingDefaults.of(write(tmp_path, neutral)).lines == ()


def test_options_are_the_files_unless_given(made, relist):
    ours = made("v2")
    write(ours.path, V3)
    out = export_bundle(ExportRequest(ours.path, ours.path.parent / "bundle")).bundle.path
    seen = []
    option = click.option("--bundle", type=click.Path(path_type=Path), default=out)
    command = click.command()(option(sampling_options(lambda params, bundle: seen.append(params))))

    def run(*arguments):
        result = CliRunner().invoke(command, arguments)
        return (seen.pop() if not result.exit_code else None), result.output

    params, said = run()
    assert params == SamplingParams(temperature=0.6, top_p=0.95)
    assert said == "temperature 0.6, top_p 0.95 unless told otherwise, by generation_config.json\n"
    assert run("--temperature", "0.1")[0] == SamplingParams(temperature=0.1, top_p=0.95)
    assert run("--greedy")[0] == SamplingParams(top_p=0.95)
    assert run("--no-generation-config") == (SamplingParams(), "")
    assert "either --greedy or --temperature" in run("--greedy", "--temperature", "0.5")[1]
    assert run("--greedy", "--temperature", "0")[0].temperature == 0
    write(out, {"temperature": -1})
    relist(out)
    assert run("--no-generation-config")[0] == SamplingParams()


def test_help_shows_the_defaults_there_are():
    shown = " ".join(CliRunner().invoke(main, ["generate", "--help"]).output.split())
    assert "[default: (generation_config.json's, else 128);" in shown
    assert "--greedy" in shown


@pytest.fixture
def bundle(made, relist, demo_checkpoint):
    """A small model with the demo's tokenizer beside it, most of whose ids it does not have, and defaults."""
    ours = made("v2")
    write(ours.path, {**V3, "max_new_tokens": 5})
    found = export_bundle(ExportRequest(ours.path, ours.path.parent / "bundle")).bundle
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint / name, found.path / name)
    return relist(found.path)


def test_python_takes_them_and_complete_params_do_not(bundle, relist):
    with LLM.open(bundle.path, threads=1) as llm:
        assert llm.defaults.params() == SamplingParams(5, temperature=0.6, top_p=0.95)
        (sampled,) = llm.generate([PROMPT])
        assert sampled == llm.generate([PROMPT], SamplingParams(5, temperature=0.6, top_p=0.95))[0]
        assert list(llm.stream(PROMPT))[-1].finish_reason
        greedy = llm.generate([PROMPT], SamplingParams(5))
    with LLM.open(bundle.path, threads=1, generation_config=False) as llm:
        assert llm.generate([PROMPT])[0].token_ids[:5] == greedy[0].token_ids
        assert llm.defaults == SamplingDefaults()
    write(bundle.path, {"temperature": -1})
    with pytest.raises(BundleError, match=r"generation_config\.json is not the file that manifest\.json lists"):
        LLM.open(bundle.path, threads=1)
    relist(bundle.path)
    with pytest.raises(BundleError, match="temperature -1"):
        LLM.open(bundle.path, threads=1)


def test_answers_end_with_ids_of_generation_config_alone(made):
    """Every token but the one of config.json: the first one ends. A change of the file makes another bundle."""
    ours = made("v2")
    out = ours.path.parent / "out"
    write(ours.path, {"eos_token_id": [token for token in range(48) if token != 1]})
    exported = export_bundle(ExportRequest(ours.path, out)).bundle
    assert sorted(exported.manifest.model.eos_token_ids) == list(range(48))
    with LLM.open(out, threads=1) as llm:
        (result,) = llm.generate([PROMPT], SamplingParams(8))
    assert (len(result.token_ids), result.finish_reason) == (1, "stop")
    write(ours.path, {"eos_token_id": 1})
    again = CliRunner().invoke(main, ["export", str(ours.path), str(out)])
    assert (again.exit_code, "not empty" in again.output) == (1, True)


def tensors(**inputs):
    types = {str: object, int: np.int32, float: np.float32}
    return {name: np.array([[value]], types[type(value)]) for name, value in inputs.items()}


def test_the_server_takes_them_where_a_request_says_nothing(bundle):
    settings = ServingSettings("ort", 2, 2, 64, 9, 64, 64, threads=1)
    llm = open_llm(bundle.path, settings)
    with llm:
        request = parse_request(tensors(text_input="a"), {}, llm.text, 0, llm.defaults)
        assert (request.params.temperature, request.params.top_p, request.params.max_new_tokens) == (0.6, 0.95, 5)
        given = tensors(text_input="a", temperature=0.0, max_tokens=7)
        assert parse_request(given, {}, llm.text, 0, llm.defaults).params.temperature == 0
        assert parse_request(given, {}, llm.text, 0, llm.defaults).params.max_new_tokens == 7

    without = dataclasses.replace(settings, generation_config=False)
    assert ServingSettings.from_parameters(without.to_parameters()) == without
    with open_llm(bundle.path, without) as llm:
        assert llm.defaults == SamplingDefaults()


def test_a_repository_is_not_written_for_a_wrong_file(bundle, relist, tmp_path):
    write(bundle.path, {"top_p": 7})
    relist(bundle.path)
    arguments = ["model-repository", str(bundle.path), str(tmp_path / "repository")]
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "generation_config.json: top_p 7.0" in refused.output) == (1, True)
    taken = CliRunner().invoke(main, [*arguments, "--no-generation-config"])
    assert taken.exit_code == 0, taken.output
    config = (tmp_path / "repository" / "deepseek_v2" / "config.pbtxt").read_text()
    assert 'key: "generation_config" value { string_value: "false" }' in config


def test_bench_stays_greedy(bundle, relist):
    """Its tokens are drawn and its speed is compared: it does not look at the file."""
    write(bundle.path, {"temperature": -1})
    relist(bundle.path)
    arguments = ["bench", str(bundle.path), "--context", "8", "--new-tokens", "3", "--threads", "1", "--json"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
