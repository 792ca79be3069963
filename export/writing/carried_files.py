"""What a bundle carries as it is of the files beside the weights: those that make text, and the model's licences."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.files import file_sha256, regular_file
from deepseek_trt.export.reading.wording import shown
from deepseek_trt.export.text.files import text_files

# LICENSE, LICENSE-MODEL, LICENCE.txt, MODEL_LICENSE, NOTICE.md: whoever passes the weights on must pass these on, too.
_LICENCE = re.compile(r"(model[-_ ]?)?(licen[sc]e|notice)(?![a-z])[^/]*", re.IGNORECASE)


def carried_files(source: Path) -> Iterator[Path]:
    """Yield the files that a bundle takes from the checkpoint in `source`: text files, then licences."""
    yield from text_files(source)
    yield from sorted(file for file in source.iterdir() if _LICENCE.fullmatch(file.name) and not file.is_dir())


def check_carried(source: Path) -> None:
    """Raise CheckpointError for one that cannot be read as a file."""
    for file in carried_files(source):
        try:
            with regular_file(file) as stream:
                stream.read(1)
        except OSError as error:
            raise CheckpointError(f"{shown(str(file))} cannot be read: {error.strerror}") from None


def carry_files(source: Path, target: Path) -> None:
    """Copy those that are in `source`."""
    for file in carried_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def carried_digests(source: Path) -> tuple[tuple[str, str], ...]:
    """Name and sha256 of each: a bundle made of others is another one."""
    return tuple((file.relative_to(source).as_posix(), file_sha256(file)) for file in carried_files(source))
