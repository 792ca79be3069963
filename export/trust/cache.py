"""The user's cache: a folder of the user's own that nobody else can write, or else a private one for this process."""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.trust.real_files import open_real
from deepseek_trt.export.writing.working import scratch_folder, working_folder

log = logging.getLogger("deepseek_trt")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DIGEST = ".sha256"  # beside a file, its hash


def cache_folder() -> Path:
    """Where this package keeps what can be made again; `own_cache` says whether it is to be trusted."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deepseek-trt"


def own_cache(part: str) -> Path | None:
    """A folder of that name in the cache, made if need be; None where others may write it, which is said once."""
    folder = cache_folder() / part
    flaw = _flaw(folder)
    if flaw:
        say_once(f"the cache {cache_folder()} is not used: {flaw}")
    return None if flaw else folder


def own_or_private(part: str) -> Path:
    """The part of the cache, or a folder in a private one that goes away with this process."""
    folder = own_cache(part)
    if folder is None or not os.access(folder, os.W_OK):
        folder = private_folder() / part
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def private_folder() -> Path:
    """A folder for this process alone."""
    stack = ExitStack()
    folder = stack.enter_context(scratch_folder())
    atexit.register(stack.close)
    return folder


def kept_file(part: str, name: str, make: Callable[[Path], None]) -> Path:
    """The file of that name in the cache, made by `make` at the path it gets where there is none, or a damaged one.

    Its sha256 lies beside it and is compared each time. Where the cache cannot be written, what is whole in it is taken
    and the rest is made in a private folder.
    """
    folder = own_cache(part)
    if folder is not None and _whole(folder, name) is not None:
        return folder / name
    if folder is not None and not os.access(folder, os.W_OK):
        say_once(f"{folder} cannot be written: {name} is made anew by each process")
    folder = own_or_private(part)
    if _whole(folder, name) is None:
        try:
            _make(folder, name, make)
        except OSError as wrong:
            reason = wrong.strerror or wrong
            raise BuildError(f"{folder / name} cannot be written ({reason}): mend that folder") from None
    return folder / name


def kept_bytes(part: str, name: str) -> bytes | None:
    """What `keep_bytes` kept under that name; None where that is gone or damaged."""
    folder = own_cache(part)
    return None if folder is None else _whole(folder, name)


def keep_bytes(part: str, name: str, data: bytes) -> None:
    """Keep what can be made again, where there is a place for it."""
    folder = own_cache(part)
    if folder is not None:
        with suppress(OSError):
            _make(folder, name, lambda path: _write(path, data), anew=True)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _make(folder: Path, name: str, make: Callable[[Path], None], anew: bool = False) -> None:
    """Unless another process makes it meanwhile, or even then where it is to be `anew`.

    Without its hash the file counts for nothing, so that comes last.
    """
    with working_folder(folder / name, wait=True) as working:
        if not anew and _whole(folder, name) is not None:
            return
        draft, digest = working / name, working / f"{name}{_DIGEST}"
        make(draft)
        draft.chmod(0o700)
        digest.write_text(file_sha256(draft), encoding="ascii")
        digest.chmod(0o600)
        _make_way(folder / digest.name, keep_files=False)
        _make_way(folder / name)
        os.replace(draft, folder / name)
        os.replace(digest, folder / digest.name)


def _make_way(path: Path, keep_files: bool = True) -> None:
    """Remove a folder at `path`, which a rename does not replace, and a file unless another process may be at it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not keep_files:
        path.unlink(missing_ok=True)


def _whole(folder: Path, name: str) -> bytes | None:
    """The bytes of the file, if it is the user's own and the one whose hash lies beside it."""
    try:
        data, digest = (_own_bytes(folder, file) for file in (name, f"{name}{_DIGEST}"))
    except (BuildError, OSError):
        return None
    return data if hashlib.sha256(data).hexdigest().encode() == digest else None


def _own_bytes(folder: Path, name: str) -> bytes:
    with open_real(folder, name, BuildError, "") as stream:
        found = os.fstat(stream.fileno())
        if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
            raise BuildError(f"others can write {folder / name}")
        return stream.read()


def _flaw(folder: Path) -> str:
    """Why others may write the folder, or why there is none; nothing where it is the user's own."""
    root = cache_folder()
    own = [root, *(root / part for part in reversed(_below(folder, root)))]
    try:
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in own:
            made.mkdir(mode=0o700, exist_ok=True)
    except OSError as wrong:
        return f"{wrong.filename or folder} cannot be made ({wrong.strerror or wrong})"
    return next(filter(None, map(_flaw_of_own, own)), "") or _flaw_of_place(root.parent.resolve())


def _below(folder: Path, root: Path) -> list[Path]:
    """`folder` and its parents below `root`, relative to it, the innermost first."""
    inner = folder.relative_to(root)
    return [inner, *inner.parents][:-1]


def _flaw_of_own(folder: Path) -> str:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is a link: make it a folder, or name another cache with XDG_CACHE_HOME"
    if found.st_uid != os.geteuid():
        return f"{folder} belongs to another user: name another cache with XDG_CACHE_HOME"
    return f"others can write {folder}: run chmod go-w {folder}" if found.st_mode & _OTHERS_WRITE else ""


def _flaw_of_place(place: Path) -> str:
    """Who can write a parent can put another folder in its place, unless it is sticky, as /tmp."""
    for parent in (place, *place.parents):
        found = parent.stat()
        group = found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid()
        open_to_others = bool(found.st_mode & stat.S_IWOTH or group) and not found.st_mode & stat.S_ISVTX
        if open_to_others or found.st_uid not in (0, os.geteuid()):
            return f"others can write {parent}, where it lies: name another cache with XDG_CACHE_HOME"
    return ""


_said: set[str] = set()


def say_once(line: str) -> None:
    """Warn of it, once a process."""
    if line not in _said:
        _said.add(line)
        log.warning(line)
