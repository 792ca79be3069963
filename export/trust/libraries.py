"""Compiled libraries that lie where others may write: loaded from memory, so that what was compared is what runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # linux/fcntl.h: F_SEAL_SEAL, _SHRINK, _GROW, _WRITE
_ADD_SEALS = 1033
_held: dict[str, Path] = {}  # by sha256; never closed, as code of an open library runs from there


def library_in_memory(data: bytes, name: str) -> Path:
    """A path, for this process alone, that holds `data` and that nobody can change; the dynamic loader takes it."""
    digest = hashlib.sha256(data).hexdigest()
    if digest not in _held:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEALS)
        _held[digest] = Path(f"/proc/self/fd/{descriptor}")
    return _held[digest]
