"""Checkpoints by name: only what the cache holds, laid out as huggingface_hub lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.hub import checkpoint_folder, hub_cache

NAME = Path("deepseek-ai/DeepSeek-V2-Lite")


def snapshot(cache: Path, commit: str, main: bool = False) -> Path:
    cached = cache / "models--deepseek-ai--DeepSeek-V2-Lite"
    folder = cached / "snapshots" / commit
    folder.mkdir(parents=True)
    if main:
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    return folder


def test_the_cache_is_huggingface_hubs():
    constants = pytest.importorskip("huggingface_hub.constants")
    assert hub_cache() == Path(constants.HF_HUB_CACHE)
    assert hub_cache({"HF_HOME": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a/hub")
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/a"}) == Path("/c")


def test_the_snapshot_of_main_or_the_only_one(tmp_path):
    only = snapshot(tmp_path, "abc")
    environment = {"HF_HUB_CACHE": str(tmp_path)}
    assert checkpoint_folder(NAME, environment) == only
    newest = snapshot(tmp_path, "def", main=True)
    assert checkpoint_folder(NAME, environment) == newest


@pytest.mark.parametrize("snapshots", [(), ("abc", "def")])
def test_what_the_cache_does_not_hold_is_not_guessed(tmp_path, snapshots):
    for commit in snapshots:
        snapshot(tmp_path, commit)
    with pytest.raises(CheckpointError, match="hf download deepseek-ai/DeepSeek-V2-Lite"):
        checkpoint_folder(NAME, {"HF_HUB_CACHE": str(tmp_path)})


def test_a_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert checkpoint_folder(NAME, {"HF_HUB_CACHE": str(tmp_path)}) == NAME
    assert checkpoint_folder(Path("/no/where/at all")) == Path("/no/where/at all")


@pytest.mark.parametrize("commit", [b"../../../elsewhere", b"\xff\xfe", b"", b"/"])
def test_a_damaged_reference_leads_nowhere(tmp_path, commit):
    snapshot(tmp_path, "abc", main=True)
    snapshot(tmp_path, "def")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models--deepseek-ai--DeepSeek-V2-Lite" / "refs" / "main").write_bytes(commit)
    with pytest.raises(CheckpointError, match="hf download"):
        checkpoint_folder(NAME, {"HF_HUB_CACHE": str(tmp_path)})
