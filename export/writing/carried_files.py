"""What a bundle carries as it is of the files beside the weights: those that make text, and the model's licences."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.files import file_sha256, regular_file
from deepseek_trt.export.reading.weight_files import CONFIG_FILE
from deepseek_trt.export.text.files import text_files
from deepseek_trt.export.text.wording import shown

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
            with regular_file(followed(file, source)) as stream:
                stream.read(1)
        except OSError as error:
            raise CheckpointError(f"{shown(str(file))} cannot be read: {error.strerror}") from None


def carry_files(source: Path, target: Path) -> None:
    """Copy those that are in `source`, and config.json. CheckpointError for a link that leads out of it."""
    for file in (source / CONFIG_FILE, *carried_files(source)):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(followed(file, source), copy)


def carried_digests(source: Path) -> tuple[tuple[str, str], ...]:
    """Name and sha256 of each: a bundle made of others is another one. CheckpointError as `carry_files`."""
    followed(source / CONFIG_FILE, source)
    files = carried_files(source)
    return tuple((file.relative_to(source).as_posix(), file_sha256(followed(file, source))) for file in files)


def followed(file: Path, source: Path) -> Path:
    """The regular file that `file` is, or is a link to: in the checkpoint, in the hub's cache that it is part of, or
    elsewhere under the same name.

    Whoever packs a checkpoint writes its links, and whoever gets the bundle would read what they lead to: LICENSE may
    be another folder's LICENSE, as people share files, and never /etc/shadow. CheckpointError where it is.
    """
    try:
        real, root = file.resolve(), source.resolve()
    except (OSError, RuntimeError):  # a circle of links
        raise CheckpointError(f"{shown(str(file))} cannot be read: it is a link that leads nowhere") from None
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root  # as Hugging Face's hub keeps them
    if not (real.is_relative_to(root) or real.is_relative_to(blobs) or real.name == file.name):
        raise CheckpointError(
            f"{file} is a link to {real}, outside of {source} and of another name: put a copy of the file there instead"
        )
    if not real.is_file():
        raise CheckpointError(f"{file} is no regular file: download it again")
    return real
