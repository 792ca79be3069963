"""Working folders: what is written lies in one until it is whole. Nothing of others is used, followed or removed.

A working folder has a predictable name beside what it is for, so that the next run finds what a killed one left. It is
taken only where it is proven this program's: a real folder of this user that nobody else can write, with a marker in
it. The marker is locked as long as a process works there; the lock ends with the process, however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.errors import OutputError

MARKER = "of-deepseek-trt"
_NEW = "new"
_SCRATCH, _BYTES = "deepseek-trt-", 8  # before a random name, and of it
_LONGEST = 200  # bytes of a name that still has room for what is added to it
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # linux/fs.h, linux/fcntl.h
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(eq=False)
class _Claim:
    """A folder that this process works in, or is about to; `made` are parents that it makes, the innermost first."""

    folder: Path
    made: tuple[Path, ...] = ()
    lock: int | None = None  # a descriptor of the marker

    def release(self) -> None:
        """Remove what is this process's, wherever a signal has interrupted the taking or an earlier release of it."""
        if self.lock is None:
            with suppress(OutputError, OSError):
                _take(self, self.folder, wait=False)
        if self.lock is not None:
            _remove(self.folder, self.lock)
            lock, self.lock = self.lock, None
            os.close(lock)
        for parent in self.made:
            with suppress(OSError):  # there is something in it
                parent.rmdir()
        _claims.remove(self)


_claims: list[_Claim] = []


def release_claims() -> None:
    """Remove the working folders that a signal has kept from being removed; for the end of a program."""
    for claim in list(_claims):
        claim.release()


@contextmanager
def claimed_folder(target: Path, wait: bool = False) -> Iterator[Path]:
    """The working folder beside `target`, of this process alone, with what a killed run left in it; removed at the end.

    Parents are made, and removed again where nothing came of it. Where another process works there, this one waits if
    `wait` says so. OutputError where the folder is another's, or cannot be made.
    """
    folder = _folder_of(target)
    claim = _Claim(folder, tuple(parent for parent in folder.absolute().parents if not parent.exists()))
    with _released(claim):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _take(claim, target, wait)
        except OSError as error:
            files = [str(parent) for parent in folder.absolute().parents if parent.is_file()]
            why = f"{files[0]} is a file" if files else error.strerror or str(error)
            raise OutputError(f"cannot write {target}: {why}") from None
        yield folder


def remove_leftover(target: Path) -> None:
    """Remove what a killed run left beside a `target` that is whole; nothing where another process works there."""
    folder = _folder_of(target)
    if folder.is_dir() and not folder.is_symlink():
        _remove_unused(folder, target)


@contextmanager
def working_folder(target: Path, wait: bool = False) -> Iterator[Path]:
    """An empty folder to make `target` in, or what is to become `target` itself; see `claimed_folder`."""
    with claimed_folder(target, wait) as claimed:
        yield new_folder(claimed)


def new_folder(claimed: Path, keep: bool = False) -> Path:
    """The folder in a claimed one that is filled, with the user's own permissions; `keep` what is in it."""
    folder = claimed / _NEW
    if not keep:
        _remove_tree(folder)
    folder.mkdir(exist_ok=True)
    return folder


def clear(folder: Path, but: Collection[str] = ()) -> None:
    """Remove what is in the folder, except for what has these names."""
    for path in folder.iterdir():
        if path.name not in but:
            _remove_tree(path)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder among the system's temporary ones; those that killed runs left there are removed first."""
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{_SCRATCH}{'[0-9a-f]' * 2 * _BYTES}"):
        _remove_unused(left, left)
    claim = _Claim(base / f"{_SCRATCH}{secrets.token_hex(_BYTES)}")
    with _released(claim):
        _take(claim, claim.folder, wait=True)
        yield claim.folder


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` at the end, or goes away with an exception.

    Another process that writes `path` now is waited for.
    """
    with working_folder(path, wait=True) as folder:
        draft = folder / _short(path.name)
        yield draft
        os.replace(draft, path)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all: aside first, then renamed."""
    with aside(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Keep others who lock `folder` out of it: all of them, or those alone who write in it where this one is `shared`.

    OutputError where that is not granted at once, unless `wait`. A file system without locks grants all.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait):
            raise OutputError(f"another deepseek-trt is at work in {folder} now: run this again when it is done")
        yield
    finally:
        os.close(descriptor)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; a folder that is there is exchanged with it, in one step where the system can.

    What was there lies in `folder` then. OutputError where `target` is no folder but something else.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} is a link or a file: remove it, or name another place")
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        old = folder.with_name("old")
        target.rename(old)
        folder.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the system could do it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # an old kernel, or a file system that cannot
        return False
    raise OSError(number, os.strerror(number), str(other))


def _folder_of(target: Path) -> Path:
    return target.with_name(f".{_short(target.name)}.partial")


def _short(name: str) -> str:
    """A name that leaves room for more letters."""
    data = os.fsencode(name)
    if len(data) <= _LONGEST:
        return name
    return f"{hashlib.sha256(data).hexdigest()[:32]}{Path(name).suffix[:16]}"


@contextmanager
def _released(claim: _Claim) -> Iterator[None]:
    """A claim to take; it is released at the end, by `release_claims` where a signal comes in the middle of that."""
    _claims.append(claim)
    try:
        yield
    finally:
        claim.release()


def _remove_unused(folder: Path, target: Path) -> None:
    """Remove a working folder in which no process is at work."""
    claim = _Claim(folder)
    with suppress(OutputError, OSError), _released(claim):
        _take(claim, target, wait=False)


def _take(claim: _Claim, target: Path, wait: bool) -> None:
    """Make the folder where it is missing, and lock its marker."""
    while True:
        with suppress(FileExistsError):
            claim.folder.mkdir(mode=0o700)
        try:
            lock = _marker(claim.folder)
        except FileNotFoundError:  # whoever had it has just removed it
            continue
        if not _lock(lock, fcntl.LOCK_EX, wait):
            os.close(lock)
            raise OutputError(f"another deepseek-trt is writing {target} now: wait for it, or name another place")
        claim.lock = lock
        if _is_there(lock, claim.folder / MARKER):
            return
        claim.lock = None
        os.close(lock)  # it was removed while this process waited


def _marker(folder: Path) -> int:
    """The marker, open; OutputError for a folder that is not proven this program's. An empty one becomes it."""
    try:
        descriptor = os.open(folder, _FOLDER)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _foreign(folder, "it is a link or a file") from None
        raise
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.geteuid():
            raise _foreign(folder, "it belongs to another user")
        if facts.st_mode & 0o022:
            raise _foreign(folder, "others may write in it")
        return _open_marker(folder, descriptor)
    finally:
        os.close(descriptor)


def _open_marker(folder: Path, descriptor: int) -> int:
    try:
        marker = os.open(MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except FileNotFoundError:
        found = os.listdir(descriptor)  # of one moment: ours has its marker before anything else, and loses it last
        if MARKER in found:  # it was made meanwhile
            raise
        if found:
            raise _foreign(folder, f"it holds no {MARKER}") from None
        try:
            return os.open(MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=descriptor)
        except FileExistsError:  # another process was faster
            raise FileNotFoundError from None
    except OSError:
        raise _foreign(folder, f"its {MARKER} is no file of this user") from None
    facts = os.fstat(marker)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(marker)
        raise _foreign(folder, f"its {MARKER} is no file of this user")
    return marker


def _foreign(folder: Path, why: str) -> OutputError:
    return OutputError(
        f"{folder} is in the way, and not this program's ({why}): move it away, or name another place to write"
    )


def _lock(descriptor: int, kind: int, wait: bool) -> bool:
    """Whether it was granted."""
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _remove(folder: Path, lock: int) -> None:
    """Remove a folder whose marker `lock` holds, the marker last: without one, what is left of it would be nobody's."""
    with suppress(OSError):
        if _is_there(lock, folder / MARKER):
            for name in os.listdir(folder):
                if name != MARKER:
                    _remove_tree(folder / name)
            if os.listdir(folder) == [MARKER]:
                (folder / MARKER).unlink()
        folder.rmdir()


def _remove_tree(path: Path) -> None:
    """Remove what is there, links never followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
