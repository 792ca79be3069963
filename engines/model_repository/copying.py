"""One file beside another: a reflink where the file system can, else a copy; a hard link where that is asked for."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from deepseek_trt.export.errors import OutputError

_FICLONE = 0x40049409  # linux/fs.h: the two files share their blocks until one is written


def copy_file(source: Path, target: Path, link: bool = False) -> None:
    """Make `target`, which is not there, of what `source` holds, symbolic links followed. OutputError where it cannot.

    onnx refuses data in a file of several hard links, so that `link` makes both files unreadable for its checker.
    """
    real = source.resolve()
    if link:
        try:
            os.link(real, target)
        except OSError as error:
            raise OutputError(f"cannot link {target} to {real} ({error.strerror}): leave out --link") from None
    elif not _reflink(real, target):
        shutil.copyfile(real, target)


def _reflink(source: Path, target: Path) -> bool:
    """Whether the file system could; where it could not, `target` is empty."""
    with source.open("rb") as given, target.open("wb") as made:
        try:
            fcntl.ioctl(made, _FICLONE, given.fileno())
        except OSError:  # not on such a file system, or on two
            return False
    return True
