"""Pipes, devices, sockets, folders and links in the place of every file that is read: one sentence, and no waiting."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepseek_trt.export.errors import DeepseekTrtError
from deepseek_trt.export.exporter import ExportRequest, Reporter, export_bundle
from deepseek_trt.export.files import read_file, regular_file
from deepseek_trt.export.reading.source import read_source

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
good = importlib.import_module("fuzzing.good")

TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
FILES = ("config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors", *TEXT)
OTHERS = ("added_tokens.json", "chat_template.jinja", "chat_template.json", "LICENSE")
SIDE = ("manifest.json", "hf_quant_config.json", "quantize_config.json")  # looked into, to say what a folder is
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A read that waits for a pipe's writer would never end: a signal ends the test."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    good.write(folder, {"config.json": good.dumped(good.CONFIG), **good.sharded(good.tensors_of(good.CONFIG))})
    good.write(folder, {path.name: path.read_bytes() for path in folder.iterdir()} | good.text_files())
    return folder


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
}


def replaced(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    KINDS[kind](path)


def refused(folder: Path, adapter: Path | None = None) -> str:
    with pytest.raises(DeepseekTrtError) as error:
        read_source(folder, adapter=adapter)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_of_a_checkpoint(checkpoint, name, kind):
    if (name, kind) == ("LICENSE", "folder"):
        pytest.skip("a folder of licences is not carried")
    replaced(checkpoint / name, kind)
    assert name in refused(checkpoint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIDE)
def test_of_files_that_say_what_a_folder_is(checkpoint, name, kind):
    """Nothing waits; what cannot be read of a manifest makes no bundle of a checkpoint."""
    replaced(checkpoint / name, kind)
    if name == "manifest.json":
        assert read_source(checkpoint).checkpoint.tensors
    else:
        assert name in refused(checkpoint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTER)
def test_of_an_adapter(checkpoint, tmp_path, name, kind):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    good.write(adapter, good.adapter_files())
    replaced(adapter / name, kind)
    assert name in refused(checkpoint, adapter)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")

    def read_meanwhile() -> None:
        with regular_file(path) as stream:
            stream.read()
            path.write_bytes(b"another")

    with pytest.raises(OSError, match="it changed while it was read"):
        read_meanwhile()


def test_a_file_that_is_too_long(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_file(tmp_path / "x", 4)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002-of-00003.safetensors"])
def test_a_checkpoint_that_changes_while_it_is_exported(checkpoint, tmp_path, name):
    def change(step: str, _: int | None) -> None:
        if step.startswith("writing"):
            (checkpoint / name).write_bytes((checkpoint / name).read_bytes() + b" ")

    with pytest.raises(DeepseekTrtError) as error:
        export_bundle(ExportRequest(checkpoint, tmp_path / "out"), Reporter(step=change))
    assert "changed while it was exported" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_says_so(checkpoint):
    (checkpoint / "config.json").chmod(0)
    if os.access(checkpoint / "config.json", os.R_OK):
        pytest.skip("who runs the tests may read everything")
    assert "Permission denied" in refused(checkpoint)


def test_numbers_that_no_float_holds_are_named(checkpoint):
    """Python's json makes an infinity of 1e400, under whatever key."""
    text = json.dumps({**good.CONFIG, "router_z_loss_coef": 0.5}).replace("0.5", "1e400")
    (checkpoint / "config.json").write_text(text)
    assert "router_z_loss_coef is inf" in refused(checkpoint)
