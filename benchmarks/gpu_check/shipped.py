"""What a plugin library ships: its kernels' binaries, cut out of the shared object itself.

Nothing of the package reads it here: the manifest is JSON, and an image is where its bytes have the manifest's sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.models import Sizes

LIBRARY, MANIFEST = "libdeepseek_trt_plugins.so", "libdeepseek_trt_plugins.json"
ALIGNMENT = 64  # of images within the library
_STARTS = (b"\x7fELF", b"//", b".version")  # of a cubin, and of PTX


@dataclass(frozen=True)
class ShippedBinary:
    """One compiled kernel. max_tokens is the largest count of tokens that it serves; 0: any."""

    op: str
    kernel: str
    dtype: str
    max_tokens: int
    sm: int
    is_ptx: bool
    entry: str
    shared_bytes: int
    threads: int
    sha256: str
    constants: Mapping[str, int]
    image: bytes


@dataclass(frozen=True)
class ShippedLibrary:
    """A library's binaries, and the sizes of the model that it is for."""

    name: str
    dtype: str
    sizes: Sizes
    binaries: tuple[ShippedBinary, ...]

    @property
    def is_narrow(self) -> bool:
        """Whether it has kernels over narrow weights."""
        return any("Narrow" in b.op for b in self.binaries)

    def targets(self) -> tuple[tuple[int, bool], ...]:
        """(SM, is PTX) of what it was compiled for."""
        return tuple(sorted({(b.sm, b.is_ptx) for b in self.binaries}))

    def of(self, target: tuple[int, bool]) -> tuple[ShippedBinary, ...]:
        return tuple(b for b in self.binaries if (b.sm, b.is_ptx) == target)


def token_counts(binaries: Sequence[ShippedBinary], op: str) -> tuple[int, ...]:
    """Tokens such that each bucket's binaries are launched."""
    largest = sorted({b.max_tokens for b in binaries if b.op == op} - {0})
    return (1, *(most + 1 for most in largest))


def read_library(folder: Path, raw_config: Mapping[str, Any]) -> ShippedLibrary:
    """The library in `folder`; ValueError where it is not the one that its manifest describes."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data = (folder / LIBRARY).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{folder / LIBRARY} is not the file that {MANIFEST} describes")
    images = _images(data, manifest["binaries"])
    rows = []
    for row in manifest["binaries"]:
        facts = {key: row[key] for key in ShippedBinary.__dataclass_fields__ if key != "image"}
        rows.append(ShippedBinary(**facts, image=images[row["sha256"]]))
    name = f"{folder.name} {manifest['dtype']}"
    return ShippedLibrary(name, manifest["dtype"], Sizes.of(dict(raw_config)), tuple(rows))


def _images(data: bytes, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The bytes of each image by sha256. ValueError where the library holds none with that hash."""
    missing: dict[str, int] = {row["sha256"]: row["bytes"] for row in rows}
    found: dict[str, bytes] = {}
    for start in _starts(data):
        for sha256, size in list(missing.items()):
            image = data[start : start + size]
            if hashlib.sha256(image).hexdigest() == sha256:
                found[sha256] = image
                del missing[sha256]
    if missing:
        raise ValueError(f"{len(missing)} of the manifest's images are not in the library, e.g. {min(missing)}")
    return found


def _starts(data: bytes) -> Iterator[int]:
    for start in range(0, len(data), ALIGNMENT):
        if data.startswith(_STARTS, start):
            yield start
