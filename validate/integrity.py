"""Are the bundle's bytes those that export wrote? The reference reads the same weights: numbers cannot tell."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.weights import weight_arrays
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.export.weight_file import WEIGHTS_FILE

_CHUNK = 2**24


@dataclass(frozen=True)
class Integrity:
    """`changed_weights` are tensors whose sha256 is not the manifest's; `changed_files` are other files."""

    checked_weights: int
    changed_weights: tuple[str, ...]
    changed_files: tuple[str, ...]
    sha256: dict[str, str]

    @property
    def passed(self) -> bool:
        """Changed weights fail: reference and candidate would agree on wrong ones. A changed graph is judged by what
        it computes.
        """
        return not self.changed_weights


def check_integrity(bundle: Bundle) -> Integrity:
    """Hash every file and, where the bundle holds them, every weight. A by-reference bundle checks its own sources."""
    files = {path.name: file_sha256(path) for path in sorted(bundle.path.iterdir()) if path.is_file()}
    recorded = bundle.manifest.files
    changed_files = tuple(name for name, digest in recorded.items() if files.get(name) != digest)
    expected = {w.recipe.name: w.sha256 for w in bundle.manifest.weights if w.sha256 is not None}
    if bundle.manifest.by_reference or WEIGHTS_FILE not in files:
        return Integrity(0, (), changed_files, files)
    arrays = weight_arrays(bundle)
    changed = tuple(name for name, digest in expected.items() if _sha256(arrays[name]) != digest)
    return Integrity(len(expected), changed, changed_files, files)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
