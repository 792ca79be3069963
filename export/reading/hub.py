"""A checkpoint by the name that it has on Hugging Face's hub, where its snapshot lies in the local cache already."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from deepseek_trt.export.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name, as the hub allows it


def checkpoint_folder(given: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder `given`; or, where there is none and it reads like owner/name, that checkpoint's cached snapshot.

    Nothing is downloaded. The cache lies where huggingface_hub keeps it: HF_HUB_CACHE, else hub/ under HF_HOME, else
    huggingface/hub/ under XDG_CACHE_HOME or ~/.cache. Raises CheckpointError, with the command that downloads it, where
    the cache does not hold it.
    """
    name = given.as_posix()
    if given.exists() or not _NAME.fullmatch(name):
        return given
    cached = hub_cache(environment) / f"models--{name.replace('/', '--')}"
    snapshot = _snapshot(cached)
    if snapshot is None:
        raise CheckpointError(
            f"there is no folder {name}, and Hugging Face's cache ({cached.parent}) holds no such checkpoint: "
            f"run `hf download {name}`, or give the folder that holds config.json and *.safetensors"
        )
    return snapshot


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := environment.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"


def _snapshot(cached: Path) -> Path | None:
    """The snapshot of the branch main, else the only one there is."""
    snapshots, main = cached / "snapshots", cached / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"\w+", commit) and (snapshots / commit).is_dir():
            return snapshots / commit
    found = [path for path in snapshots.iterdir() if path.is_dir()] if snapshots.is_dir() else []
    return found[0] if len(found) == 1 else None
