"""A user's mistake: one sentence that names it and the mend, and nothing half-written left behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deepseek_trt.export import exporter
from deepseek_trt.export.errors import CheckpointError, ConfigError, DeepseekTrtError, OutputError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.writing import partial

FIRST = "model-00001-of-000002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(small_v2, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_v2.checkpoint, tmp_path / "checkpoint"))


def edit_config(root: Path, **changes) -> None:
    file = root / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_shard(root: Path, change) -> None:
    """Apply `change` to the dict of tensors of the shard that holds the final norm, and to the index."""
    index = json.loads((root / INDEX).read_text())
    file = index["weight_map"][NORM]
    tensors = load_file(root / file)
    change(tensors)
    save_file(tensors, root / file)
    others = {n: f for n, f in index["weight_map"].items() if f != file}
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**others, **dict.fromkeys(tensors, file)}}))


def truncate(root: Path) -> None:
    data = (root / FIRST).read_bytes()
    (root / FIRST).write_bytes(data[:-1000])


MISTAKES = {
    "no folder": (lambda r: shutil.rmtree(r), CheckpointError, "is not a folder"),
    "no config": (lambda r: (r / "config.json").unlink(), ConfigError, "config.json is missing"),
    "no safetensors": (lambda r: (r / INDEX).unlink(), CheckpointError, "neither"),
    "config not JSON": (lambda r: (r / "config.json").write_text("{"), ConfigError, "is not JSON"),
    "missing shard": (lambda r: (r / FIRST).unlink(), CheckpointError, f"names {FIRST}, which is missing"),
    "truncated shard": (truncate, CheckpointError, "truncated"),
    "empty shard": (lambda r: (r / FIRST).write_bytes(b""), CheckpointError, "truncated"),
    "damaged header": (
        lambda r: (r / FIRST).write_bytes(b"\x08" + b"\0" * 7 + b"{nothing"),
        CheckpointError,
        "damaged",
    ),
    "topk_method": (lambda r: edit_config(r, topk_method="hash"), ConfigError, "topk_method 'hash' is not"),
    "another model": (lambda r: edit_config(r, model_type="llama"), ConfigError, "model_type 'llama'"),
    "vision model": (lambda r: edit_config(r, vision_config={}), ConfigError, "vision"),
    "no latent attention": (lambda r: edit_config(r, use_mla=False), ConfigError, "use_mla is false"),
    "tensor missing": (lambda r: edit_shard(r, lambda t: t.pop(NORM)), CheckpointError, f"{NORM} is missing"),
    "tensor left over": (
        lambda r: edit_shard(r, lambda t: t.update(surprise=t[NORM].clone())),
        CheckpointError,
        "left over, e.g. surprise",
    ),
    "wrong shape": (
        lambda r: edit_shard(r, lambda t: t.update({NORM: t[NORM][:-1].clone()})),
        DeepseekTrtError,
        "[64]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_and_leaves_nothing(checkpoint, tmp_path, name):
    make, kind, words = MISTAKES[name]
    make(checkpoint)
    with pytest.raises(kind) as caught:
        export_bundle(ExportRequest(checkpoint, tmp_path / "out"))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert [p.name for p in tmp_path.iterdir() if p != checkpoint] == []


def test_out_is_not_empty(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not empty"):
        export_bundle(ExportRequest(checkpoint, out))
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_no_space(checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(OutputError, match=r"0\.0 GB free, 0\.1 GB are needed"):
        export_bundle(ExportRequest(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_failure_while_writing_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "_trace_to_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_bundle(ExportRequest(checkpoint, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_same_inputs_do_nothing_and_others_are_refused(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert export_bundle(ExportRequest(checkpoint, out)).fresh
    stamps = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert not export_bundle(ExportRequest(checkpoint, out)).fresh
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == stamps
    with pytest.raises(OutputError, match="is not empty"):
        export_bundle(ExportRequest(checkpoint, out, dtype="float32"))


def test_checkpoint_without_tokenizer_exports_and_says_so(checkpoint, tmp_path):
    result = export_bundle(ExportRequest(checkpoint, tmp_path / "out"))
    assert any("--token-ids" in note for note in result.bundle.manifest.notes)


def test_num_layers(checkpoint, tmp_path):
    result = export_bundle(ExportRequest(checkpoint, tmp_path / "out", num_layers=2))
    assert result.bundle.manifest.model.num_hidden_layers == 2
    assert {d.reason for d in result.bundle.manifest.dropped} == {"only the first 2 layers are exported"}
    with pytest.raises(ConfigError, match="--num-layers 9"):
        export_bundle(ExportRequest(checkpoint, tmp_path / "other", num_layers=9))
