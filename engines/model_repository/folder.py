"""A model's folder in a repository: described by its manifest.json, and put in place as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepseek_trt.export.errors import OutputError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.writing.working import put_in_place, working_folder

MANIFEST = "manifest.json"
MODEL_FILE = "model.py"  # what the server loads
VERSION = "1"


def write_manifest(version_folder: Path, facts: Mapping[str, Any]) -> None:
    """manifest.json over all files that are in the folder now, and `facts`."""
    names = sorted(path.relative_to(version_folder).as_posix() for path in version_folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST and "__pycache__" not in name]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(lambda name: file_sha256(version_folder / name), names)
        manifest = {**facts, "files": dict(zip(names, digests, strict=True))}
    (version_folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def manifests(repository: Path) -> dict[str, dict[str, Any]]:
    """What write_manifest wrote, by model; models of others have none."""
    files = sorted(repository.glob(f"[!.]*/{VERSION}/{MANIFEST}"))
    return {file.parents[1].name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def written_inputs(target: Path) -> str | None:
    """The fingerprint of what is there, None for nothing whole; OutputError where something else is."""
    if target.is_symlink():
        raise OutputError(f"{target} is a link: remove it, or give --name")
    if not target.exists():
        return None
    try:
        written = json.loads((target / VERSION / MANIFEST).read_text(encoding="utf-8"))["inputs"]
        return str(written) if (target / "config.pbtxt").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{target} is there and is no model of deepseek-trt's: move it away, or give --name"
        ) from None


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder under another name, then put it in the place of `target`: a server never sees half a model."""
    with working_folder(target) as folder:
        write(folder)
        put_in_place(folder, target)
