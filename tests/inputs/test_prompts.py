"""Prompts from options, files and standard input: the whole text of each, or one sentence about what is wrong.

Rules of our own; that a file's last line end is not part of the prompt is llama.cpp's, too (its --file).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle

SPEED = r"(?m)^\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s$"


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of) -> Bundle:
    return bundle_of(demo_checkpoint)


@pytest.fixture
def generate(demo):
    """generate(*options, stdin=b""): click's result of the command on the demo model."""

    def invoke(*options: object, stdin: bytes = b"", bundle: Path = demo.path):
        arguments = ["generate", str(bundle), "--max-new-tokens", "2", *map(str, options)]
        return CliRunner().invoke(main, arguments, input=stdin)

    return invoke


@pytest.fixture
def prompts_of(generate, demo):
    """The text of every prompt that was run, as the tokenizer gives it back."""

    def prompts(*options: object, stdin: bytes = b"") -> list[str]:
        result = generate(*options, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        assert re.search(SPEED, result.stderr)
        return [Text(demo).decode(json.loads(line)["prompt_ids"]) for line in result.stdout.splitlines()]

    return prompts


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"one line", "one line"),
        (b"one line\n", "one line"),
        (b"one line\r\n", "one line"),
        (b"two\n\nlines\n\n", "two\n\nlines\n"),
        (b"  spaces  \n", "  spaces  "),
        (b"\xef\xbb\xbfmarked\n", "marked"),
        ("深度求索\n".encode(), "深度求索"),
    ],
)
def test_a_file_and_standard_input_are_one_prompt_each(data, prompt, prompts_of, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(data)
    file = ("--prompt-file", tmp_path / "prompt.txt")
    assert prompts_of(*file, "--prompt", "-", stdin=data) == [prompt, prompt]
    assert prompts_of(stdin=data) == [prompt]


def test_several_prompts_are_one_batch(prompts_of, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"file {name}")
    files = ("--prompt-file", tmp_path / "a", "--prompt-file", tmp_path / "b", "--prompt-file", "-")
    assert prompts_of(*files, "--prompt", "text", stdin=b"typed") == ["text", "file a", "file b", "typed"]


def test_standard_input_is_left_alone_where_there_is_a_prompt(prompts_of):
    assert prompts_of("--prompt", "x", stdin=b"\xff") == ["x"]


def test_system_prompt(prompts_of):
    chat = prompts_of("--chat", "--system", "Be brief.", stdin=b"hi\n")
    assert chat == ["Be brief.\n\nUser: hi\n\nAssistant:"]


def test_template_options(prompts_of, tmp_path):
    template = "{{ tools[0].function.name }}|{{ thinking }}|{{ n + 1 }}|{{ s }}|{{ d.a }}|{{ messages[0].content }}"
    (tmp_path / "mine.jinja").write_text(template)
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": {"name": "f"}}]))
    given = ("thinking=true", "n=1", "s=a=b", 'd={"a": null}')
    arguments = [part for one in given for part in ("--chat-template-arg", one)]
    files = ("--chat-template", tmp_path / "mine.jinja", "--tools", tmp_path / "tools.json")
    assert prompts_of("--chat", "--prompt", "hi", *files, *arguments) == ["f|True|2|a=b|None|hi"]


def test_what_the_template_does_not_read_is_said(generate):
    result = generate("--chat", "--prompt", "hi", "--chat-template-arg", "thinkng=true")
    assert result.exit_code == 0
    assert "note: the chat template does not read thinkng" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give either --prompt or --token-ids"),
        (["--prompt", "x", "--token-ids", "1"], "give either --prompt or --token-ids"),
        (["--prompt-file", "FILE", "--token-ids", "1"], "give either --prompt or --token-ids"),
        (["--token-ids", "1", "--chat"], "--chat is for text"),
        (["--token-ids", "1", "--system", "x"], "--system is for text"),
        (["--prompt", "x", "--system", "x"], "--system is for messages"),
        (["--prompt", "x", "--tools", "FILE"], "--tools is for messages"),
        (["--prompt", "x", "--chat-template", "x"], "--chat-template is for messages"),
        (["--prompt", "x", "--chat-template-arg", "x=1"], "--chat-template-arg is for messages"),
        (["--chat", "--prompt", "x", "--chat-template-arg", "x"], "give key=value"),
        (["--chat", "--prompt", "x", "--chat-template-arg", "=1"], "give key=value"),
        (["--chat", "--prompt", "x", "--chat-template-arg", "a=1", "--chat-template-arg", "a=2"], "a is given twice"),
        (["--prompt", "-", "--prompt", "-"], "standard input is one prompt"),
        (["--prompt", "-", "--prompt-file", "-"], "standard input is one prompt"),
        (["--prompt-file", "/nowhere"], "does not exist"),
        (["--prompt-file", "/"], "is a directory"),
    ],
)
def test_options_that_do_not_go_together_are_a_mistake_of_use(options, words, generate, tmp_path):
    (tmp_path / "file").write_text("[]")
    result = generate(*(tmp_path / "file" if option == "FILE" else option for option in options))
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (b"\xff\xfe", ["--prompt-file", "FILE"], r"file is not UTF-8 \(invalid start byte at byte 0\)"),
        (b"", ["--prompt-file", "FILE"], r"file is empty"),
        (b"\n", ["--prompt-file", "FILE"], r"file is empty"),
        (b"word " * 2100, ["--prompt-file", "FILE"], r"has \d+ tokens; the model takes at most 2047"),
        (b"word " * 200_000, ["--prompt-file", "FILE"], r"has \d+ characters, more than the model has tokens for"),
        (b"{", ["--chat", "--prompt", "x", "--tools", "FILE"], r"file is not JSON"),
        (b"[" * 100_000, ["--chat", "--prompt", "x", "--tools", "FILE"], r"file is not JSON"),
        (b'{"a": 1}', ["--chat", "--prompt", "x", "--tools", "FILE"], r"tools .*: give a list of objects"),
        (b"{{ x.y.z }}", ["--chat", "--prompt", "x", "--chat-template", "FILE"], r"file, line 1: the chat template"),
        (b"{% if", ["--chat", "--prompt", "x", "--chat-template", "FILE"], r"file, line 1: the chat template"),
        (b"", ["--chat", "--prompt", "x", "--chat-template", "other"], r"'other' is neither a file nor a name"),
        (b"", ["--chat", "--prompt", "x", "--chat-template-arg", "messages=1"], r"'messages': not one that can be set"),
    ],
)
def test_bad_input_is_one_sentence(data, options, words, generate, tmp_path):
    (tmp_path / "file").write_bytes(data)
    result = generate(*(tmp_path / "file" if option == "FILE" else option for option in options))
    assert result.exit_code == 1
    assert re.search(words, result.stderr), result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\n"])
def test_bad_standard_input_is_one_sentence(data, generate):
    result = generate(stdin=data)
    assert result.exit_code == 1
    assert re.search(r"error: standard input is (not UTF-8|empty)", result.stderr)


@pytest.mark.parametrize("options", [["--prompt", "x"], ["--prompt", "x", "--prompt", "y"], ["--token-ids", "5,6"]])
def test_every_run_says_how_fast_it_was(options, generate):
    result = generate(*options)
    assert result.exit_code == 0, result.output
    assert re.search(SPEED, result.stderr)
    assert "tokens/s" not in result.stdout
