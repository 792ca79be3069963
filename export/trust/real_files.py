"""Real files of a folder, by plain names: no link on the way, no pipe or device, nothing that waits to be opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from deepseek_trt.export.errors import DeepseekTrtError

Errors = type[DeepseekTrtError]
_LONGEST = 255  # bytes of one name, on every file system that Linux has
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}


def flaw_of_name(name: str) -> str:
    """Why `name` is none of a file in a folder or in a folder of it; nothing where it is one."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name:
        return "leads out of the folder"
    try:
        if any(len(os.fsencode(part)) > _LONGEST for part in parts):
            return "is too long"
    except UnicodeEncodeError:
        return "has half a character"
    return ""


def open_real(folder: Path, name: str, error: Errors, mend: str) -> BinaryIO:
    """Open `name` in `folder` for reading. Raises `error`, which ends with `mend`, for anything but a real file.

    The folder itself may be a link; nothing below it may.
    """
    flaw = flaw_of_name(name)
    if flaw:
        raise error(f"{folder}: the name {name!r} {flaw}: {mend}")
    *folders, last = name.split("/")
    at = folder
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in folders:
            at /= part
            descriptor = _below(descriptor, part, _FLAGS | os.O_DIRECTORY)
        at /= last
        descriptor = _below(descriptor, last, _FLAGS)
    except FileNotFoundError:
        raise error(f"{folder / name} is missing: {mend}") from None
    except OSError as wrong:
        raise error(_why_not(at, wrong, mend)) from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise error(_unreal(at, kind, mend))
    return os.fdopen(descriptor, "rb")


def _below(folder: int, name: str, flags: int) -> int:
    """The descriptor of `name` in the folder, whose own is closed."""
    try:
        return os.open(name, flags, dir_fd=folder)
    finally:
        os.close(folder)


def _why_not(path: Path, wrong: OSError, mend: str) -> str:
    """A link, a socket and a folder's name that is a file's are refused by open itself."""
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except OSError:
        kind = stat.S_IFREG
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return _unreal(path, kind, mend)
    return f"{path} cannot be read ({wrong.strerror or wrong}): mend its permissions, or {mend}"


def _unreal(path: Path, kind: int, mend: str) -> str:
    return f"{path} is {_KINDS.get(kind, 'a device')}, not a file: put the file itself there, or {mend}"
