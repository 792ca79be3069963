"""The weights file: what it holds, what a killed run leaves, and what is left behind by everything else: nothing."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE
from deepseek_trt.export.bundle.recipes import narrow_pair
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import OutputError
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.writing.partial import finish, partial_folder
from deepseek_trt.export.writing.weight_file import JOURNAL_FILE, write_weights
from deepseek_trt.export.writing.weight_plan import plan_weights

RAW = {
    "model_type": "deepseek_v3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
}


class KilledError(Exception):
    pass


@pytest.fixture
def source(tmp_path, weights_of, save):
    folder = save(tmp_path / "checkpoint", RAW, {"model.safetensors": weights_of(RAW)}, index=False)
    checkpoint = Checkpoint.open(folder)
    return plan_weights(ModelConfig.from_hf(RAW), checkpoint, 2).recipes, checkpoint.tensors


@pytest.fixture
def narrow_source(source):
    """With narrow weights among the others: rows of the others' widths fit no group."""
    recipes, tensors = source
    pairs = {r.name: narrow_pair(r, "int4", 32, "least_squares") for r in recipes if r.shape[-1] == 32 and r.shape[1:]}
    return tuple(part for r in recipes for part in pairs.get(r.name, (r,))), tensors


def ignore(done: int) -> None:
    pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hashes_and_places(tmp_path, source, dtype):
    recipes, tensors = source
    path = tmp_path / WEIGHTS_FILE
    written = write_weights(recipes, tensors, dtype, path, ignore)
    data = path.read_bytes()
    found = {t.name: t for t in read_header(path)}
    for recipe, tensor in zip(recipes, written, strict=True):
        place = found[tensor.name]
        assert (recipe.name, recipe.shape, recipe.dtype(dtype)) == (place.name, place.shape, place.dtype)
        assert (place.offset, place.nbytes) == (tensor.offset, tensor.nbytes)
        assert hashlib.sha256(data[tensor.offset : tensor.offset + tensor.nbytes]).hexdigest() == tensor.sha256
    kinds = {name.rpartition(".")[2]: place.dtype for name, place in found.items()}
    assert kinds["e_score_correction_bias"] == "float32"
    assert kinds["gate_proj"] == dtype


def killed_after(tensors_done: int, tmp_path: Path, source) -> Path:
    """The files of a run that stopped inside a tensor."""
    recipes, tensors = source
    path, calls = tmp_path / WEIGHTS_FILE, 0

    def stop(done: int) -> None:
        nonlocal calls
        calls += 1
        if calls > tensors_done:
            raise KilledError

    with pytest.raises(KilledError):
        write_weights(recipes, tensors, "float32", path, stop)
    assert len((tmp_path / JOURNAL_FILE).read_text().splitlines()) == tensors_done
    return path


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_killed_run_is_continued(tmp_path, source, done):
    recipes, tensors = source
    (tmp_path / "whole").mkdir()
    expected = write_weights(recipes, tensors, "float32", tmp_path / "whole" / WEIGHTS_FILE, ignore)
    path = killed_after(done, tmp_path, source)
    reported = []
    assert write_weights(recipes, tensors, "float32", path, reported.append) == expected
    assert path.read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    assert sum(reported) == sum(w.nbytes for w in expected)


@pytest.mark.parametrize("done", [*range(6), 15])
def test_a_killed_run_of_narrow_weights_is_continued(tmp_path, narrow_source, done):
    recipes, tensors = narrow_source
    (tmp_path / "whole").mkdir()
    expected = write_weights(recipes, tensors, "float32", tmp_path / "whole" / WEIGHTS_FILE, ignore)
    path = tmp_path / WEIGHTS_FILE
    calls = []

    def stop(count: int) -> None:
        calls.append(count)
        if len(calls) > done:
            raise KilledError

    with pytest.raises(KilledError):
        write_weights(recipes, tensors, "float32", path, stop)
    finished = (tmp_path / JOURNAL_FILE).read_text().splitlines()
    for lines in (finished, finished[:-1]):  # the last of them may be scales without their codes
        (tmp_path / JOURNAL_FILE).write_text("".join(f"{line}\n" for line in lines))
        reported = []
        assert write_weights(recipes, tensors, "float32", path, reported.append) == expected
        assert path.read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
        assert sum(reported) == sum(w.nbytes for w in expected)


def test_finished_tensors_are_not_written_again(tmp_path, source):
    recipes, tensors = source
    path = killed_after(5, tmp_path, source)
    gone = {piece.source for recipe in recipes[:5] for piece in recipe.pieces}
    left = {name: tensor for name, tensor in tensors.items() if name not in gone}
    write_weights(recipes, left, "float32", path, ignore)  # a KeyError would tell


def test_damaged_tensors_are_written_again(tmp_path, source):
    recipes, tensors = source
    (tmp_path / "whole").mkdir()
    write_weights(recipes, tensors, "float32", tmp_path / "whole" / WEIGHTS_FILE, ignore)
    path = killed_after(5, tmp_path, source)
    data = bytearray(path.read_bytes())
    data[4096 + 10] ^= 1  # in the first tensor
    path.write_bytes(data)
    with (tmp_path / JOURNAL_FILE).open("a") as journal:
        journal.write('{"name": "cut of')
    write_weights(recipes, tensors, "float32", path, ignore)
    assert path.read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()


def test_a_file_of_other_recipes_is_not_continued(tmp_path, source):
    recipes, tensors = source
    path = killed_after(5, tmp_path, source)
    write_weights(recipes, tensors, "bfloat16", path, ignore)
    assert {tensor.dtype for tensor in read_header(path)} == {"bfloat16", "float32"}


# The folder


def test_partial_folder_becomes_the_target(tmp_path):
    out = tmp_path / "out"
    with partial_folder(out, "inputs", 0) as folder:
        (folder / "file").write_text("x")
        finish(folder, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), partial_folder(tmp_path / "out", "inputs", 0):
        raise error
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small(tmp_path):
    with pytest.raises(OutputError, match="GB free"), partial_folder(tmp_path / "out", "inputs", 10**18):
        pass
    assert not list(tmp_path.iterdir())


def test_two_runs_with_one_target(tmp_path):
    with partial_folder(tmp_path / "out", "a", 0) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(OutputError, match="another deepseek-trt"), partial_folder(tmp_path / "out", "a", 0):
            pass
        assert (folder / "file").exists()


_HANG = """
import sys, time
from pathlib import Path
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.writing.partial import partial_folder
with partial_folder(Path(sys.argv[1]), "inputs", 0) as folder:
    (folder / "file").write_text("kept")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_the_folder_for_the_same_inputs_only(tmp_path, kill):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", _HANG, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, kill)
    partial = tmp_path / ".out.partial"
    assert (partial / "new" / "file").read_text() == "kept"
    with partial_folder(out, "inputs", 0) as folder:
        assert (folder / "file").read_text() == "kept"
    assert not partial.exists()
    with subprocess.Popen([sys.executable, "-c", _HANG, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, kill)
    with partial_folder(out, "others", 0) as folder:
        assert not (folder / "file").exists()


def test_a_chunk_at_a_time(tmp_path, monkeypatch):
    """Chunks smaller than a tensor, and than a row, give the same bytes."""
    from safetensors.torch import save_file

    from deepseek_trt.export.bundle import assemble as source_reader
    from deepseek_trt.export.bundle.recipes import Piece, Recipe

    save_file({"w": torch.randn(37, 29)}, tmp_path / "model.safetensors")
    tensors = Checkpoint.open(tmp_path).tensors
    recipe = Recipe("w", (3, 10, 29), (Piece("w", 2, 10, 12, 3),))
    whole = source_reader.assemble(recipe, tensors, "float32")
    monkeypatch.setattr(source_reader, "CHUNK", 52)
    assert (source_reader.assemble(recipe, tensors, "float32") == whole).all()


_KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path
from deepseek_trt.export.exporter import ExportRequest, Reporter, export_bundle
def step(text, total):
    if text.startswith("tracing"):
        os.kill(os.getpid(), signal.SIGKILL)
export_bundle(ExportRequest(Path(sys.argv[1]), Path(sys.argv[2])), Reporter(step))
"""


def test_export_after_a_kill(tmp_path, weights_of, save):
    """Killed when all weights are written: the next run writes none, and makes the same bundle."""
    checkpoint = save(tmp_path / "checkpoint", RAW, {"model.safetensors": weights_of(RAW)}, index=False)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    done = subprocess.run([sys.executable, "-c", _KILLED_EXPORT, str(checkpoint), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    weights = (partial / "new" / WEIGHTS_FILE).read_bytes()
    bundle = export_bundle(ExportRequest(checkpoint, out)).bundle
    assert (out / WEIGHTS_FILE).read_bytes() == weights
    assert not partial.exists()
    assert {file.name for file in out.iterdir()} == {*bundle.manifest.files, "manifest.json", WEIGHTS_FILE}
