"""tokenizer.json that is damage or malice: loaded within limits first, and one sentence."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import CheckpointError, ConfigError, RequestError
from deepseek_trt.export.text.reading import read_text
from deepseek_trt.export.text.tokenizer import refusals
from deepseek_trt.export.trials.trial import trial

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
good = importlib.import_module("fuzzing.good")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def growing(times: int, levels: int) -> dict[str, Any]:
    """A normalizer that writes `times` letters for each, again and again."""
    one = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * times}
    return {"type": "Sequence", "normalizers": [one] * levels}


def nested(levels: int) -> bytes:
    return b'{"normalizer": ' + b'{"type": "Sequence", "normalizers": [' * levels


CHANGED = {
    "a pattern that looks back for ever": ({"pre_tokenizer": split(r"(a+)+$")}, "panics"),
    "another": ({"pre_tokenizer": split(r"(\w+\s?)*$")}, "panics"),
    "a pattern that none is": ({"pre_tokenizer": split("(")}, "cannot be loaded"),
    "a normalizer that fills the memory": (
        {"normalizer": growing(1000, 3)},
        "memory|seconds of a processor",  # whichever limit comes first
    ),
    "a normalizer that multiplies": ({"normalizer": growing(100, 1)}, "tokens of a text"),
    "a model of no kind": ({"model": {"type": "X"}}, "cannot be loaded"),
    "no model": ({"model": None}, "cannot be loaded"),
    "added tokens of negative ids": (
        {"added_tokens": [{"id": -1, "content": "a", "special": True}]},
        "cannot be loaded",
    ),
}
BYTES = {
    "nested": (nested(100_000), "cannot be loaded"),
    "empty": (b"", "cannot be loaded"),
    "a list": (b"[]", "cannot be loaded"),
    "zeros": (b"\0" * 4096, "cannot be loaded"),
    "no UTF-8": (b'{"version": "\xff"}', "cannot be loaded"),
    "half": (good.tokenizer()[: len(good.tokenizer()) // 2], "cannot be loaded"),
    "larger than any": (b" " * (2**27 + 1), "larger than"),
}


def sentence(folder: Path, data: bytes) -> str:
    good.write(folder, {**good.text_files(), "tokenizer.json": data})
    with pytest.raises((CheckpointError, ConfigError)) as error:
        read_text(folder, good.CONFIG, ModelConfig.from_hf(good.CONFIG))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("name", CHANGED)
def test_changed(tmp_path, name, capfd):
    changes, words = CHANGED[name]
    assert re.search(words, sentence(tmp_path, good.dumped({**json.loads(good.tokenizer()), **changes})))
    assert capfd.readouterr().err == ""  # the library's own report of a panic is none of a user's


@pytest.mark.parametrize("name", BYTES)
def test_damaged(tmp_path, name):
    data, words = BYTES[name]
    assert words in sentence(tmp_path, data)


def test_vocabularies_that_do_not_fit_their_merges(tmp_path):
    raw = json.loads(good.tokenizer())
    raw["model"]["merges"].append(["no", "token"])
    assert "cannot be loaded" in sentence(tmp_path, good.dumped(raw))


def test_a_million_added_tokens_end_within_the_limits(tmp_path):
    """Loaded, or refused: never without end."""
    raw = json.loads(good.tokenizer())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    raw["added_tokens"] += [{"id": 288 + i, "content": f"<{i}>", **flags} for i in range(200_000)]
    good.write(tmp_path, {**good.text_files(), "tokenizer.json": json.dumps(raw).encode()})
    try:
        read_text(tmp_path, good.CONFIG, ModelConfig.from_hf(good.CONFIG))
    except CheckpointError as error:
        assert "it takes more than" in str(error)  # noqa: PT017 - or it is accepted


def test_a_token_around_every_text_that_the_model_lacks(tmp_path):
    files = good.text_files()
    config = {**json.loads(files["tokenizer_config.json"]), "bos_token": "<new>"}
    good.write(tmp_path, {**files, "tokenizer_config.json": good.dumped(config)})
    with pytest.raises(CheckpointError, match=r"the token '<new>' \(288\), and the model's ids end at 287"):
        read_text(tmp_path, good.CONFIG, ModelConfig.from_hf(good.CONFIG))


SCRIPTS = {
    "ends": ("pass", ""),
    "never ends": ("while True: pass", "more than 1 seconds"),
    "fills the memory": ("import os; x = bytearray(10**11)", "ended with 1"),
    "aborts": ("import os; os.abort()", "memory"),
    "says why": ("print('because'); import os, sys; sys.stdout.flush(); os._exit(3)", "because"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_trials(tmp_path, name):
    code, words = SCRIPTS[name]
    limits = (
        "import resource, sys\ns, m = map(int, sys.argv[1:])\nresource.setrlimit(resource.RLIMIT_CPU, (s, s + 1))\n"
    )
    (tmp_path / "script.py").write_text(f"{limits}resource.setrlimit(resource.RLIMIT_AS, (m, m))\n{code}\n")
    assert words in trial(tmp_path / "script.py", b"", seconds=1)
    assert bool(words) == bool(trial(tmp_path / "script.py", b"", seconds=1))


def test_a_prompt_on_which_the_library_panics(bundle_of, tmp_path):
    """Of patterns that fail on rarer texts than those that were tried."""
    from tokenizers import Regex, pre_tokenizers

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    files = {"config.json": good.dumped(good.CONFIG), **good.one_file(good.tensors_of(good.CONFIG))}
    good.write(folder, {**files, **good.text_files()})
    text = Text(Bundle.open(bundle_of(folder).path))
    text._tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(q+)+$"), "isolated")
    with pytest.raises(RequestError, match="cannot be encoded"):
        text.encode("q" * 60 + "!")


def test_what_is_no_fault_of_the_library_passes():
    def interrupted() -> None:
        with refusals(RequestError, "{}"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
