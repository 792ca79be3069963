"""The folder that an export fills before it is renamed: it survives a kill, and nothing else that goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_trt.export.errors import OutputError
from deepseek_trt.export.text.valid import check_place
from deepseek_trt.export.writing.working import claimed_folder, new_folder

INPUTS_FILE = "inputs.sha256"  # beside the folder that is filled: what the export that fills it is of


@contextmanager
def partial_folder(out: Path, fingerprint: str, needed: int) -> Iterator[Path]:
    """A hidden folder beside `out` to fill and then `finish`, after checking that the disk has room for `needed` bytes.

    What a killed run with the same `fingerprint` left in it is still there; what other inputs left is removed. Parents
    of `out` are made. An exception removes all of it, Ctrl-C included. OutputError where it cannot be made, or where
    another export is in it.
    """
    check_out(out)
    out = _plain(out)
    with claimed_folder(out) as claimed:
        try:
            folder = _kept_if_same(claimed, fingerprint)
            _check_room(folder, needed)
            yield folder
        except OSError as error:
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from None


def finish(folder: Path, out: Path) -> None:
    """Put the filled folder where it belongs; `out` may be an empty folder."""
    folder.rename(_plain(out))


def check_out(out: Path) -> None:
    """OutputError for a place that no folder can be renamed to, before anything is made."""
    check_place(out, OutputError)
    place = _plain(out)
    if place.is_symlink():
        raise OutputError(f"{out} is a link to {place.readlink()}: name the folder itself")
    if place.exists() and not place.is_dir():
        raise OutputError(f"{out} is a file: name another folder")
    if place.exists() and place.samefile("."):
        raise OutputError(f"{out} is the current folder: name one in it, or another")
    if place.is_mount():
        raise OutputError(f"{out} is where a disk is mounted: name a folder in it")


def _plain(out: Path) -> Path:
    """An absolute path that ends with a name: of the folders before it links are followed."""
    out = out.absolute()
    return out.resolve() if out.name in ("", "..") else out


def _kept_if_same(claimed: Path, fingerprint: str) -> Path:
    inputs = claimed / INPUTS_FILE
    if inputs.is_file() and inputs.read_text(encoding="utf-8", errors="replace") == fingerprint:
        return new_folder(claimed, keep=True)
    inputs.unlink(missing_ok=True)  # before the folder is emptied: half of it must pass for nobody's
    folder = new_folder(claimed)
    inputs.write_text(fingerprint, encoding="utf-8")
    return folder


def _check_room(folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        place = folder.parents[1]
        raise OutputError(f"{place} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")
