"""Files: their sha256."""

from __future__ import annotations

import hashlib
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
