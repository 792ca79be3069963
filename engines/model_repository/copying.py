"""One file beside another: a reflink where the file system can, else a copy; a hard link where that is asked for."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from deepseek_trt.export.errors import BundleError, OutputError

_FICLONE = 0x40049409  # linux/fs.h: the two files share their blocks until one is written


def real_file(file: Path, folder: Path) -> Path:
    """`file` with links followed; BundleError where that is no regular file, or lies outside `folder`."""
    try:
        real = file.resolve(strict=True)
        regular = stat.S_ISREG(real.lstat().st_mode)
    except (OSError, RuntimeError):  # a circle of links
        raise BundleError(f"{file} is a link that leads nowhere, or is missing: export the checkpoint again") from None
    if not regular:
        raise BundleError(f"{file} is no regular file: export the checkpoint again")
    if not real.is_relative_to(folder.resolve()):
        raise BundleError(f"{file} leads out of {folder}, to {real}, which is not copied: put the file itself there")
    return real


def copy_file(real: Path, target: Path, link: bool = False) -> None:
    """Make `target`, which is not there, of what the regular file `real` holds. OutputError where it cannot.

    onnx refuses data in a file of several hard links, so that `link` makes both files unreadable for its checker.
    """
    if link:
        try:
            os.link(real, target, follow_symlinks=False)
        except OSError as error:
            raise OutputError(f"cannot link {target} to {real} ({error.strerror}): leave out --link") from None
        return
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as given, target.open("xb") as made:
        if not _reflink(given, made):
            shutil.copyfileobj(given, made, 2**22)


def _reflink(given: BinaryIO, made: BinaryIO) -> bool:
    """Whether the file system could; where it could not, `made` is empty."""
    try:
        fcntl.ioctl(made, _FICLONE, given.fileno())
    except OSError:  # not on such a file system, or on two
        return False
    return True
