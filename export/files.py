"""Files: reading regular ones alone, and their sha256."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**20  # bytes read at once: small enough to stay in the processor's cache


@contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """The file for reading. OSError, at once, for a pipe, device, socket or folder, and for a file that changes.

    FileNotFoundError where there is nothing; a link that leads nowhere is another OSError.
    """
    try:
        _check_regular(path.stat())  # before it is opened: that alone makes some devices act
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link to a file that is not there: download it again") from None
        raise
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        before = os.fstat(stream.fileno())
        _check_regular(before)
        yield stream
        after = os.fstat(stream.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(errno.EBUSY, "it changed while it was read: wait until it is written")


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file; OSError as from regular_file, and where there are more than `most`."""
    with regular_file(path) as stream:
        data = stream.read(most + 1) or b""
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes: download it again")
    return data


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file: put the file itself in its place")


def file_sha256(path: Path) -> str:
    """Hex digest of the file's bytes, in bounded memory. OSError as from regular_file."""
    with regular_file(path) as stream:
        return stream_sha256(stream)


def stream_sha256(stream: BinaryIO, length: int | None = None) -> str:
    """Hex digest of the next `length` bytes (None: of all that are left), or of fewer where the stream ends."""
    digest = hashlib.sha256()
    while data := stream.read(CHUNK if length is None else min(length, CHUNK)):
        digest.update(data)
        length = None if length is None else length - len(data)
    return digest.hexdigest()
