"""Are the bundle's bytes those that export wrote? The reference reads the same weights: numbers cannot tell."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.weights import WeightReader
from deepseek_trt.export.files import file_sha256


@dataclass(frozen=True)
class Integrity:
    """`changed_weights` are tensors whose sha256 is not the manifest's; `changed_files` are other files.

    `sha256` holds every file of the bundle by its path in it, plans among them, and the plugin library that plans name;
    `checkpoint_sha256` the checkpoint's parts that are still as export found them.
    """

    checked_weights: int
    changed_weights: tuple[str, ...]
    changed_files: tuple[str, ...]
    sha256: dict[str, str]
    checkpoint_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Changed weights fail: reference and candidate would agree on wrong ones. A changed graph is judged by what
        it computes.
        """
        return not self.changed_weights


def check_integrity(bundle: Bundle) -> Integrity:
    """Hash every file and, where the bundle holds them, every weight. A by-reference bundle checks its own sources."""
    files = {name: file_sha256(path) for name, path in sorted(_files(bundle).items())}
    recorded = bundle.manifest.files
    changed_files = tuple(name for name, digest in recorded.items() if files.get(name) != digest)
    expected = {w.recipe.name: w.sha256 for w in bundle.manifest.weights if w.sha256 is not None}
    checkpoint = {path.name: file_sha256(path) for path in unchanged_parts(bundle)}
    if bundle.manifest.by_reference or WEIGHTS_FILE not in files:
        return Integrity(0, (), changed_files, files, checkpoint)
    reader = WeightReader(bundle)
    changed = tuple(name for name, digest in expected.items() if reader.sha256(name) != digest)
    return Integrity(len(expected), changed, changed_files, files, checkpoint)


def unchanged_parts(bundle: Bundle) -> list[Path]:
    """The checkpoint's files that export read, as far as they are there and have its size and time."""
    found = []
    for source in bundle.manifest.sources:
        path = Path(bundle.manifest.checkpoint) / source.name
        stat = path.stat() if path.is_file() else None
        if stat is not None and (stat.st_size, stat.st_mtime_ns) == (source.size, source.mtime_ns):
            found.append(path)
    return found


def _files(bundle: Bundle) -> dict[str, Path]:
    """By their path in the bundle, or as a plan's record names them."""
    found = {path.relative_to(bundle.path).as_posix(): path for path in bundle.path.rglob("*") if path.is_file()}
    for record in sorted(bundle.path.glob("*.plan.json")):
        name = json.loads(record.read_text(encoding="utf-8")).get("plugin_library")
        if name and (bundle.path / name).is_file():
            found.setdefault(name, bundle.path / name)
    return found
