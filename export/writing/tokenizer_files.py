"""The text files beside the weights: a bundle carries them as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.text.files import text_files


def carry_files(source: Path, target: Path) -> None:
    """Copy the text files that are in `source`."""
    for file in text_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def text_digests(source: Path) -> tuple[tuple[str, str], ...]:
    """Name and sha256 of each: a bundle made of others is another one."""
    return tuple((file.relative_to(source).as_posix(), file_sha256(file)) for file in text_files(source))
