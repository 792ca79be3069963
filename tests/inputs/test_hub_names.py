"""A checkpoint by its name on the hub, as downloaded: links into blobs, and licences beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from deepseek_trt.export.survey import survey

NAME = "deepseek-ai/Demo"


@pytest.fixture
def snapshot(demo_checkpoint, tmp_path, monkeypatch) -> Path:
    """The demo model in a cache, each file a link to a blob as huggingface_hub makes them."""
    cached = tmp_path / "hub" / "models--deepseek-ai--Demo"
    folder, blobs = cached / "snapshots" / "0123", cached / "blobs"
    folder.mkdir(parents=True)
    shutil.copytree(demo_checkpoint, blobs)
    (blobs / "LICENSE-MODEL").write_text("a licence")
    for blob in blobs.iterdir():
        (folder / blob.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_name_is_its_snapshot(snapshot, tmp_path):
    checked = run("check", NAME, "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["checkpoint"] == str(snapshot)
    assert survey(Path(NAME)).facts == survey(snapshot).facts
    out = tmp_path / "out"
    assert run("export", NAME, out).exit_code == 0
    bundle = Bundle.open(out)
    assert bundle.manifest.checkpoint == str(snapshot)
    assert "LICENSE-MODEL" in bundle.manifest.files
    assert not export_bundle(ExportRequest(snapshot, out)).fresh
    proved = run("validate", out, "--backend", "exported", "--checkpoint", NAME, "--threads", 1, "--no-independent")
    assert proved.exit_code == 0, proved.output
    assert run("model-repository", out, tmp_path / "models").exit_code == 0
    placed = tmp_path / "models" / "deepseek_v2" / "1" / "bundle" / "LICENSE-MODEL"
    assert placed.read_text() == "a licence"
    assert not placed.is_symlink()


@pytest.mark.parametrize("arguments", [("check",), ("export", "OUT"), ("validate", "--checkpoint")])
def test_a_name_that_the_cache_does_not_hold(snapshot, demo_checkpoint, bundle_of, tmp_path, arguments):
    command, *more = arguments
    given = {"check": ["a/b"], "export": ["a/b", tmp_path / "out"]}.get(command)
    result = run(command, *(given or [bundle_of(demo_checkpoint).path, *more, "a/b"]))
    assert (result.exit_code, "run `hf download a/b`" in result.stderr) == (1, True)
