"""What lies in a folder: which files are read and which ignored, and names with something before them.

The rule of files is transformers' (modeling_utils._get_resolved_checkpoint_files, 5.24), which `loaded` asks.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.interface import Interface
from deepseek_trt.export.exporter import ExportRequest
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.source import read_source
from deepseek_trt.export.reading.weight_files import find_weight_files
from deepseek_trt.validate.backends.published_files import published_files
from deepseek_trt.validate.backends.published_weights import published_weights

NORM, HEAD = "model.norm.weight", "lm_head.weight"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder: Path, tensors: dict[str, torch.Tensor], **index: str) -> None:
    """Write the tensors as two shards and their index; `index` changes what it says of a tensor, "" leaves it out."""
    names = list(tensors)
    for part, file in enumerate(SHARDS):
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    weight_map.update({name.replace("_DOT_", "."): file for name, file in index.items()})
    weight_map = {name: file for name, file in weight_map.items() if file}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def written(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / WEIGHTS_FILE)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is the test extra's")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.filterwarnings("default")  # other people's
def test_one_file_beside_a_stale_index_is_what_is_read(made, verdict):
    one = made()
    shard(one.path, {name: torch.zeros_like(tensor) for name, tensor in one.tensors.items()})
    found = verdict(one.path)
    for text in (found.check, found.export):
        assert f"read from {ONE}, as transformers reads them; ignored: " in text
        assert INDEX in text
        assert SHARDS[0] in text
    assert torch.equal(written(found.bundle)[NORM], one.tensors[NORM])
    assert torch.equal(loaded(one.path)[NORM], one.tensors[NORM])
    assert torch.equal(published_weights(Bundle.open(found.bundle), None)(NORM), one.tensors[NORM])


@pytest.mark.parametrize(
    "name",
    ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "x.gguf"],
)
def test_what_is_ignored_is_said(made, verdict, name):
    one = made()
    (one.path / name).write_bytes(b"never opened")
    found = verdict(one.path)
    assert f"ignored: {name}" in found.check
    assert f"ignored: {name}" in found.export


def test_nothing_is_said_where_nothing_is_ignored(made, verdict):
    assert "ignored" not in verdict(made().path).check


@pytest.mark.filterwarnings("default")  # other people's
def test_shards_are_read_whole(made, verdict):
    """A tensor that the index lacks is loaded by transformers; one that no model needs is dropped by both."""
    one = made()
    (one.path / ONE).unlink()
    shard(one.path, {**one.tensors, "surprise": torch.ones(1)}, lm_head_DOT_weight="", surprise="")
    found = verdict(one.path)
    assert "2 tensors of the shards are not in their index: lm_head.weight, surprise" in found.check
    assert torch.equal(written(found.bundle)[HEAD], one.tensors[HEAD])
    assert torch.equal(loaded(one.path)[HEAD], one.tensors[HEAD])


def test_of_two_copies_the_last_must_be_the_one_that_is_named(made, verdict):
    one = made()
    (one.path / ONE).unlink()
    shard(one.path, one.tensors)
    copies = [load_file(one.path / file) for file in SHARDS]
    twice = next(iter(copies[0]))
    save_file({**copies[1], twice: torch.zeros_like(copies[0][twice])}, one.path / SHARDS[1])
    assert f"both hold {twice}" in verdict(one.path).check


BROKEN = {
    "no index": (lambda f: (f / INDEX).unlink(), "which says how model-00001-of-00002.safetensors, model-00002"),
    "one shard": (lambda f: [(f / INDEX).unlink(), (f / SHARDS[0]).unlink()], "is one of 2 shards"),
    "shard missing": (lambda f: (f / SHARDS[1]).unlink(), f"names {SHARDS[1]}, which is missing"),
    "index names more": (
        lambda f: edit_index(f, lambda m: m.update({"model.extra.weight": SHARDS[0]})),
        "holds model.extra.weight, but it does not",
    ),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "is not a safetensors index"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "is not a safetensors index"),
    "index empty": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "is not a safetensors index"),
    "index nested": (lambda f: (f / INDEX).write_text("[" * 100_000), "is not a safetensors index"),
    "index of numbers": (lambda f: edit_index(f, lambda m: m.update({NORM: 1})), f"'{NORM}' lies in 1"),
    "index leaves": (lambda f: edit_index(f, lambda m: m.update({NORM: "../x.safetensors"})), "leaves"),
    "index names NUL": (lambda f: edit_index(f, lambda m: m.update({NORM: "a\0b"})), "leaves"),
    "index names a long file": (lambda f: edit_index(f, lambda m: m.update({NORM: "a" * 5000})), "cannot be read"),
}


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_packages_are_named(made, verdict, name):
    change, words = BROKEN[name]
    one = made()
    (one.path / ONE).unlink()
    shard(one.path, one.tensors)
    change(one.path)
    found = verdict(one.path)
    assert words in found.check
    assert words in found.export


@pytest.mark.filterwarnings("default")  # other people's
def test_config_may_name_the_file(made, verdict):
    """transformers' key transformers_weights comes before every other rule."""
    one = made(transformers_weights="tuned.safetensors")
    tuned = {name: tensor + 1 for name, tensor in one.tensors.items()}
    save_file(tuned, one.path / "tuned.safetensors", metadata={"format": "pt"})
    found = verdict(one.path)
    assert f"ignored: {ONE}" in found.check
    assert torch.equal(written(found.bundle)[NORM], tuned[NORM])
    assert torch.equal(loaded(one.path)[NORM], tuned[NORM])
    assert published_files(one.path)[NORM].file.name == "tuned.safetensors"


@pytest.mark.parametrize(
    ("value", "words"), [("gone.safetensors", "missing"), (3, "is 3"), ("../x.safetensors", "leaves")]
)
def test_a_file_that_config_names_wrongly(made, verdict, value, words):
    assert words in verdict(made(transformers_weights=value).path).check


def test_an_odd_file_beside_a_pickle_is_not_the_model(made, verdict):
    """transformers would load pytorch_model.bin."""
    one = made()
    (one.path / ONE).rename(one.path / "model.fp16.safetensors")
    (one.path / "pytorch_model.bin").write_bytes(b"")
    assert "transformers would load pytorch_model.bin" in verdict(one.path).check


def test_the_files_of_macos_are_no_weights(made):
    one = made()
    (one.path / ONE).rename(one.path / "odd.safetensors")
    (one.path / "._odd.safetensors").write_bytes(b"")
    assert find_weight_files(one.path).shards == (one.path / "odd.safetensors",)


@pytest.mark.parametrize("kind", ["fifo", "folder", "broken link", "git lfs"])
def test_something_else_in_the_place_of_weights(made, verdict, kind):
    one = made()
    (one.path / ONE).unlink()
    if kind == "fifo":
        os.mkfifo(one.path / ONE)
    elif kind == "folder":
        (one.path / ONE).mkdir()
    elif kind == "broken link":
        (one.path / ONE).symlink_to("../../blobs/none")
    else:
        (one.path / ONE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    words = {"broken link": "is a link to a file that is not there", "git lfs": "git lfs pull"}
    assert words.get(kind, "is no regular file") in verdict(one.path).check


# Names


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


PREFIXES = {
    "base_model.model.": renamed(lambda n: f"base_model.model.{n}"),  # PEFT
    "module.": renamed(lambda n: f"module.{n}"),  # DDP
    "_orig_mod.": renamed(lambda n: f"_orig_mod.{n}"),  # torch.compile
    "language_model.": renamed(lambda n: f"language_model.{n}"),
    "transformer.": renamed(lambda n: n if n == HEAD else n.replace("model.", "transformer.", 1)),
    "model.": renamed(lambda n: f"model.{n}"),
    "model. ": renamed(  # as transformers reads it, too
        lambda n: n if n == HEAD else f"model.{n}"
    ),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_known_prefix_is_taken_away(made, verdict, prefix):
    one = made(stored=PREFIXES[prefix])
    plain = made(name="plain")
    found = verdict(one.path)
    assert f"names begin with {prefix.strip()}, which is taken away" in found.check
    ours, theirs = written(found.bundle), written(verdict(plain.path).bundle)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    weights = published_weights(Bundle.open(found.bundle), None)
    assert torch.equal(weights(HEAD), plain.tensors[HEAD])
    assert torch.equal(weights(NORM), plain.tensors[NORM])


def test_prefixes_one_within_the_other(made):
    one = made(
        stored=renamed(lambda n: f"module._orig_mod.{n.replace('layers.0.', 'layers.0._checkpoint_wrapped_module.')}")
    )
    opened, plain = Checkpoint.open(one.path), Checkpoint.open(made(name="plain").path)
    assert opened.tensors.keys() == plain.tensors.keys() == published_files(one.path).keys()
    assert len(opened.notes) == 2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("bare", [HEAD, NORM])
def test_a_prefix_that_one_tensor_lacks_is_refused(made, verdict, prefix, bare):
    found = verdict(made(stored=renamed(lambda n: n if n == bare else prefix + n)).path)
    assert f"begin with {prefix}" in found.check
    assert f"others do not ({bare})" in found.export


def test_an_unknown_prefix_is_named(made, verdict):
    assert "begin with 'wrapped.model.'" in verdict(made(stored=renamed(lambda n: f"wrapped.{n}")).path).check


def test_two_tensors_of_one_name_are_refused(made, verdict):
    def stored(tensors):
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return {**bare, NORM: torch.zeros(32)}

    assert f"are both {NORM}" in verdict(made(stored=stored).path).check


def test_a_bundle_is_called_one(made, verdict):
    bundle = verdict(made().path).bundle
    again = bundle.with_name("again")
    shutil.copytree(bundle, again)
    assert "is a bundle that deepseek-trt export wrote" in verdict(again).check


def test_no_folder_and_an_empty_one(verdict, tmp_path):
    assert "is not a folder" in verdict(tmp_path / "none").check
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in verdict(tmp_path / "empty").check


def test_the_task_is_the_checkpoints(made, verdict, tmp_path):
    """Without --task both commands take what the heads say; with another, both refuse."""
    head = made("v2", architectures=["DeepseekV2Model"], stored=lambda t: {n: v for n, v in t.items() if n != HEAD})
    source = read_source(head.path, ExportRequest(head.path, tmp_path / "out", no_cache=True).interface)
    assert source.interface == Interface("feature-extraction", cache=False)
    assert "it is for feature-extraction" in source.notes[0]
    assert not verdict(head.path, "--task", "text-generation").accepted
    assert not verdict(head.path, "--task", "text-classification").accepted


def test_a_damaged_tokenizer_is_refused_by_both(made, verdict):
    one = made()
    (one.path / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in verdict(one.path).check
