"""Cases that the fuzzer found, kept: what was wrong of each, and the words that name it now."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_trt.engines.text.template import ChatTemplates
from deepseek_trt.export.errors import DeepseekTrtError
from deepseek_trt.export.reading.source import read_source

sys.path.insert(0, str(Path(__file__).parent))
good = importlib.import_module("fuzzing.good")

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header(text: str) -> dict[str, bytes]:
    """A checkpoint of one file with this header and one number."""
    data = text.encode()
    return {"model.safetensors": struct.pack("<Q", len(data)) + data + b"\0" * 4}


def entry(**changes: Any) -> str:
    return json.dumps({"a": {**ENTRY, **changes}})


def changed(name: str, **changes: Any) -> dict[str, bytes]:
    """One JSON file of the good ones, with these keys."""
    files = {**good.text_files(), **good.adapter_files(), "config.json": good.dumped(good.CONFIG)}
    return {name: good.dumped({**json.loads(files[name]), **changes})}


def twice_unindexed() -> dict[str, bytes]:
    """A tensor in two shards that the index does not name."""
    tensors = good.tensors_of(good.CONFIG)
    files = good.sharded(tensors, 2)
    from safetensors.torch import load, save

    for name in [name for name in files if name.endswith("tensors")]:
        files[name] = save({**load(files[name]), "extra": tensors["model.norm.weight"]})
    return files


FILES = {
    "half a character in a tensor's name": (header(entry().replace('"a"', r'"\ud800"')), "half a character"),
    "NaN under a key that is not read": (header(entry(more=float("nan"))), "'more' beside dtype"),
    "1e400 there": (header(entry(more=1).replace("1}", "1e400}")), "'more' beside dtype"),
    "an offset of -0": (header(entry().replace("[0, 4]", "[-0, 4]")), "-0 is no whole number"),
    "a tensor in two shards, and not in the index": (twice_unindexed(), "both hold extra"),
    "infinity in a key of training": (changed("config.json", aux_loss_alpha=float("inf")), "aux_loss_alpha is inf"),
    "NaN deep in a harmless key": (
        changed("config.json", task_specific_params={"a": [float("nan")]}),
        "task_specific_params.",
    ),
    "false for the added tokens": (changed("tokenizer_config.json", added_tokens_decoder=False), "must be an object"),
    "null for the added tokens": (changed("tokenizer_config.json", added_tokens_decoder=None), "must be an object"),
    "a dtype without a name": (changed("config.json", dtype=""), "torch_dtype"),
    "an activation without a name": (changed("config.json", hidden_act=""), "hidden_act"),
    "a torch_dtype without a name": (changed("config.json", torch_dtype=""), "torch_dtype"),
    "false for special tokens": (changed("tokenizer_config.json", extra_special_tokens=False), "must be a list"),
}
ADAPTERS = {
    "layers_pattern alone": (changed("adapter_config.json", layers_pattern=["layers"]), "layers_pattern"),
    "a task that is a list": (changed("adapter_config.json", task_type=["CAUSAL_LM"]), "task_type"),
    "control characters in a key": (changed("adapter_config.json", **{"\x1b[1m": 1}), r"\x1b[1m 1 is not supported"),
    "a pattern that looks back for ever": (
        changed("adapter_config.json", target_modules=r"(([a-z._0-9])+)+!"),
        "seconds of a processor",
    ),
    "a pattern that is one only alone": (
        changed("adapter_config.json", modules_to_save=["(?i)norm"]),
        "modules_to_save",
    ),
    "a count that overflows": (changed("adapter_config.json", modules_to_save=["a{99999999999}"]), "modules_to_save"),
    "false for a list": (changed("adapter_config.json", modules_to_save=False), "modules_to_save"),
}


def refused(folder: Path, adapter: Path | None = None) -> str:
    with pytest.raises(DeepseekTrtError) as error:
        read_source(folder, adapter=adapter)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.fixture
def files() -> dict[str, bytes]:
    return {"config.json": good.dumped(good.CONFIG), **good.one_file(good.tensors_of(good.CONFIG)), **good.text_files()}


@pytest.mark.parametrize("name", FILES)
def test_of_checkpoints(tmp_path, files, name):
    changes, words = FILES[name]
    if "model.safetensors.index.json" in changes:
        del files["model.safetensors"]
    good.write(tmp_path, {**files, **changes})
    assert words in refused(tmp_path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_of_adapters(tmp_path, files, name):
    changes, words = ADAPTERS[name]
    for folder, contents in (("base", files), ("adapter", {**good.adapter_files(), **changes})):
        (tmp_path / folder).mkdir()
        good.write(tmp_path / folder, contents)
    assert words in refused(tmp_path / "base", tmp_path / "adapter")


def test_notes_are_plain_lines(tmp_path, files):
    more = changed("generation_config.json", **{"\n\x1b[31m": True})
    good.write(tmp_path, {**files, **more})
    notes = read_source(tmp_path).notes
    assert any(r"\n\x1b[31m True is not honoured" in note for note in notes)
    assert all(note.isprintable() for note in notes)


def test_an_index_of_another_size_is_noted(tmp_path, files):
    del files["model.safetensors"]
    sharded = good.sharded(good.tensors_of(good.CONFIG))
    index = json.loads(sharded["model.safetensors.index.json"])
    for size, noted in ((index["metadata"]["total_size"], False), (1, True), ("1", True), (True, True)):
        index["metadata"]["total_size"] = size
        good.write(tmp_path, {**files, **sharded, "model.safetensors.index.json": good.dumped(index)})
        assert any("total_size" in note for note in read_source(tmp_path).notes) == noted


def test_added_tokens_json_is_not_read_beside_a_list(tmp_path, files):
    good.write(tmp_path, {**files, "added_tokens.json": b'{"\\n": 288}'})
    assert any("added_tokens.json is not read" in note for note in read_source(tmp_path).notes)


def test_names_of_templates_are_escaped(tmp_path, files):
    named = changed("tokenizer_config.json", chat_template=[{"name": "\x1b[31m", "template": "x"}])
    del files["chat_template.jinja"]
    good.write(tmp_path, {**files, **named})
    with pytest.raises(DeepseekTrtError) as error:
        ChatTemplates(tmp_path).render(good.MESSAGES)
    assert str(error.value).isprintable()
