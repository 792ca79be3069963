"""Text that is no text: lone surrogates, bytes that are no UTF-8, NUL: one sentence, wherever they come in."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.request import parse_request
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import ConfigError, RequestError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.reading.classifier import Classifier
from deepseek_trt.export.text.valid import flaw_of, printable, text_of_bytes

HALF, BYTE = "a\ud83d!", "a\udcff!"  # half an emoji as JSON may spell it, and the argument b"a\xff!"
INVALID = {HALF: r"lone surrogate U\+D83D at character \d", BYTE: r"not UTF-8 .byte 0xff at character \d"}


@pytest.fixture
def bundle(made, relist, demo_checkpoint):
    """A small model with the demo's tokenizer beside it, most of whose ids it does not have."""
    ours = made("v2")
    found = export_bundle(ExportRequest(ours.path, ours.path.parent / "bundle")).bundle
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint / name, found.path / name)
    return relist(found.path)


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@pytest.mark.parametrize(("text", "words"), INVALID.items(), ids=ascii)
def test_prompts_and_stops_in_every_way(bundle, text, words):
    made = Text(bundle)
    for encode in (made.encode, lambda t: made.encode_chat([{"role": "user", "content": t}])):
        with pytest.raises(RequestError, match=words):
            encode(text)
        with pytest.raises(RequestError, match=words):
            encode(text * 3000)  # which goes another way
    with pytest.raises(RequestError, match=words):
        SamplingParams(stop=("fine", text))
    for arguments in (("--prompt", text), ("--prompt", text, "--chat"), ("--prompt", "a", "--stop", text)):
        result = run("generate", bundle.path, *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_text_that_is_valid(bundle):
    """NUL is a character like others, as in transformers; U+FFFD, private and unassigned ones, too."""
    made = Text(bundle)
    for text in ("a\0b", "\ufffd", "\ue000", "\U0010ffff", "\u202e", "e\u0301"):
        assert made.decode(made.encode(text)) == text
        assert flaw_of(text) == ""
        SamplingParams(stop=(text,))


def tensors(**inputs):
    return {name: np.array([values], object) for name, values in inputs.items()}


@pytest.mark.parametrize(
    "inputs",
    [
        {"text_input": [b"a\xff"]},
        {"text_input": [b"\xed\xa0\x80"]},  # a surrogate as some encoders write it
        {"text_input": [HALF]},
        {"text_input": [b"a"], "stop_words": [b"a", b"\xff"]},
        {"messages": [b"\xff"]},
        {"messages": [rb'[{"role": "user", "content": "\ud83d"}]']},
        {"messages": [rb'[{"role": "\ud83d", "content": "a"}]']},
        {"messages": [rb'[{"role": "user", "\ud83d": "a"}]']},
        {"messages": [b"[" * 100_000]},
        {"messages": [b'[{"role": "user", "content": ' + b"9" * 5000 + b"}]"]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_requests_to_the_server(bundle, inputs):
    with pytest.raises(RequestError) as caught:
        parse_request(tensors(**inputs), {}, Text(bundle))
    assert printable(str(caught.value)).isprintable()


def test_stop_token_ids_of_a_request(bundle):
    text = Text(bundle)
    given = {**tensors(text_input=[b"a"]), "stop_token_ids": np.array([[3, 5]], np.int32)}
    assert parse_request(given, {}, text).params.stop_token_ids == (3, 5)
    assert parse_request(tensors(text_input=[b"a"]), {}, text).params.stop_token_ids == ()
    with pytest.raises(RequestError, match="stop_token_ids"):
        parse_request({**given, "stop_token_ids": np.array([[3, -5]], np.int32)}, {}, text)


@pytest.mark.parametrize(("data", "words"), [(b"a\xff", "start byte at byte 1"), (b"\xe6", "unexpected end of data")])
def test_bytes_say_where(data, words):
    with pytest.raises(RequestError, match=f"text_input is not UTF-8 .*{words}"):
        text_of_bytes(data, "text_input")


def test_labels():
    checkpoint = SimpleNamespace(tensors={"score.weight": SimpleNamespace(shape=(2, 4))})
    with pytest.raises(ConfigError, match=r"id2label 1 in config.json holds half a character"):
        Classifier.from_hf({"id2label": {"0": "fine", "1": "\ud83d"}}, checkpoint)


@pytest.mark.parametrize(
    "command", ["check", "export", "generate", "classify", "bench", "validate", "model-repository"]
)
def test_names_of_files_that_are_no_utf8(tmp_path, command):
    """Escaped in the message, as an error of one sentence."""
    more = {"export": ["out"], "generate": ["--prompt", "a"], "classify": ["--text", "a"], "model-repository": ["out"]}
    result = run(command, tmp_path / "no\udcff", *more.get(command, []))
    assert result.exit_code == 1
    assert r"no\udcff" in result.stderr


def test_folders_that_are_no_utf8(made, bundle):
    """A checkpoint may lie in one; a bundle and a repository may not, as ONNX Runtime opens no file there."""
    ours = made("v2", name="bytes \udcff")
    out = ours.path.parent / "out"
    assert run("check", ours.path).exit_code == 0
    exported = run("export", ours.path, out, "--json")
    assert exported.exit_code == 0, exported.output
    assert json.loads((out / "manifest.json").read_text())["checkpoint"] == str(ours.path.resolve())
    assert run("export", ours.path, out).stdout.startswith("nothing to do")
    for arguments in (("export", ours.path), ("model-repository", bundle.path)):
        refused = run(*arguments, ours.path.parent / "new \udcfe")
        assert refused.exit_code == 1
        assert r"new \udcfe' is not UTF-8 (byte 0xfe at character" in refused.stderr
    out.rename(ours.path.parent / "moved \udcfd")
    moved = run("generate", ours.path.parent / "moved \udcfd", "--token-ids", "3")
    assert (moved.exit_code, "name a folder in UTF-8" in moved.stderr) == (1, True)
