"""The folder that an export fills before it is renamed: it survives a kill, and nothing else that goes wrong."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepseek_trt.export.errors import OutputError
from deepseek_trt.export.text.valid import check_place

INPUTS_FILE = "inputs.sha256"  # what the export that fills the folder is of


@contextmanager
def partial_folder(out: Path, fingerprint: str, needed: int) -> Iterator[Path]:
    """A hidden folder beside `out` to fill and then `finish`, after checking that the disk has room for `needed` bytes.

    What a killed run with the same `fingerprint` left in it is still there; what other inputs left is removed. Parents
    of `out` are made. An exception removes all of it, Ctrl-C included. OutputError where it cannot be made, or where
    another export is in it.
    """
    check_place(out, OutputError)
    out = out.absolute()
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    folder = out.with_name(f".{out.name}.partial")
    lock = _make_locked(folder, out)
    try:
        _keep_if_same(folder, fingerprint)
        _check_room(folder, needed)
        yield folder
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        for parent in made:
            with suppress(OSError):  # there is a bundle in it
                parent.rmdir()


def finish(folder: Path, out: Path) -> None:
    """Put the filled folder where it belongs; `out` may be an empty folder."""
    if out.exists():
        out.rmdir()
    folder.rename(out)


def _make_locked(folder: Path, out: Path) -> int:
    """A descriptor whose lock ends with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise OutputError(f"another export is writing {out} now: wait for it, or name another folder") from None
    return lock


def _keep_if_same(folder: Path, fingerprint: str) -> None:
    inputs = folder / INPUTS_FILE
    if inputs.is_file() and inputs.read_text(encoding="utf-8") == fingerprint:
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    inputs.write_text(fingerprint, encoding="utf-8")


def _check_room(folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise OutputError(f"{folder.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")
