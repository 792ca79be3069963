"""Listing: a folder whose files are opened by listed names alone, and used only with the sha256 that is listed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.files import stream_sha256
from deepseek_trt.export.trust.real_files import Errors, open_real

AGAIN = "export the checkpoint again"


@dataclass(frozen=True)
class Listing:
    """The names that may be opened in `folder`, with their sha256. `by` is the file that lists them.

    What raises says `error`, and at its end how to mend it.
    """

    folder: Path
    sha256: Mapping[str, str]
    by: str
    error: Errors = BundleError

    def __contains__(self, name: str) -> bool:
        return name in self.sha256

    def read(self, name: str, mend: str = AGAIN) -> bytes:
        """The file's bytes: those that were compared."""
        wanted = self._wanted(name, mend)
        with open_real(self.folder, name, self.error, mend) as stream:
            data = self._bytes(stream, name, mend)
        if hashlib.sha256(data).hexdigest() != wanted:
            raise self._changed(name, mend)
        return data

    def open(self, name: str, mend: str = AGAIN) -> BinaryIO:
        """The file, for what is too large for memory: compared first, through the same descriptor."""
        wanted = self._wanted(name, mend)
        stream = open_real(self.folder, name, self.error, mend)
        try:
            if stream_sha256(stream) != wanted:
                raise self._changed(name, mend)
            stream.seek(0)
        except BaseException as wrong:
            stream.close()
            if isinstance(wrong, OSError):
                raise self._unreadable(name, wrong, mend) from None
            raise
        return stream

    def check(self, names: Iterable[str], mend: str = AGAIN) -> None:
        """Compare the files of these names, holding none of them."""
        for name in names:
            self.open(name, mend).close()

    def is_true(self, name: str) -> bool:
        """Whether the file is listed, there, and what is listed."""
        if name not in self:
            return False
        try:
            self.check((name,))
        except self.error:
            return False
        return True

    def _wanted(self, name: str, mend: str) -> str:
        try:
            return self.sha256[name]
        except KeyError:
            there = (self.folder / name).is_symlink() or (self.folder / name).exists()
            what = f"lies there, but {self.by} does not list it" if there else "is missing"
            raise self.error(f"{self.folder / name} {what}: {mend}") from None

    def _bytes(self, stream: BinaryIO, name: str, mend: str) -> bytes:
        try:
            return stream.read()
        except OSError as wrong:
            raise self._unreadable(name, wrong, mend) from None

    def _unreadable(self, name: str, wrong: OSError, mend: str) -> Exception:
        return self.error(f"{self.folder / name} cannot be read ({wrong.strerror or wrong}): {mend}")

    def _changed(self, name: str, mend: str) -> Exception:
        return self.error(
            f"{self.folder / name} is not the file that {self.by} lists (its sha256 differs): put that one back, or "
            f"{mend}"
        )
