"""Files: their sha256, and writing them aside before they are put in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**20  # bytes read at once: small enough to stay in the processor's cache


def file_sha256(path: Path) -> str:
    """Hex digest of the file's bytes, in bounded memory."""
    with path.open("rb") as stream:
        return stream_sha256(stream)


def stream_sha256(stream: BinaryIO, length: int | None = None) -> str:
    """Hex digest of the next `length` bytes (None: of all that are left), or of fewer where the stream ends."""
    digest = hashlib.sha256()
    while data := stream.read(CHUNK if length is None else min(length, CHUNK)):
        digest.update(data)
        length = None if length is None else length - len(data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all: aside first, then renamed."""
    with aside(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end, or goes away with an exception."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
