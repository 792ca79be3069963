"""Checkpoint: what lies in a folder of safetensors, read from the headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.header import read_header
from deepseek_trt.export.reading.names import published_names
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.reading.weight_files import WeightFiles, find_weight_files
from deepseek_trt.export.text.wording import shown, some


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint folder by their published names.

    `files` are the shards, in order of name; `unindexed` are tensors that lie in a shard and that the index does not
    name; `notes` say what lies in the folder and was not read, and what was done to names.
    """

    root: Path
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    unindexed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def is_packed(self) -> bool:
        """Whether there are tensors whose numbers are unpacked of others."""
        return any(tensor.packed is not None for tensor in self.tensors.values())

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Read the header of every file that transformers would load.

        Raises CheckpointError for a missing or damaged file, for an index that its shards contradict, and for names
        that are not the published ones.
        """
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a folder: give the folder that holds config.json and *.safetensors")
        try:
            files = find_weight_files(root)
        except OSError as error:
            raise CheckpointError(f"{root} cannot be read: {error.strerror or error}") from None
        stored = _stored(files)
        tensors, notes = published_names(stored)
        if not tensors:
            raise CheckpointError(f"{files.source} holds no tensors; download it again")
        unindexed = frozenset(name for name, t in tensors.items() if files.index and t.name not in files.index)
        said = (*files.notes, *_size_note(files, stored.values()), *_unindexed_note(unindexed), *notes)
        return cls(root, tensors, tuple(dict.fromkeys(files.shards)), unindexed, said)


def _stored(files: WeightFiles) -> dict[str, StoredTensor]:
    """Every tensor of every shard: transformers loads them whole, whatever the index names of them."""
    found = {file: {t.name: t for t in read_header(file)} for file in files.shards}
    if files.index is not None:
        _check_index(files, files.index, found)
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def _check_index(files: WeightFiles, index: dict[str, str], found: dict[Path, dict[str, StoredTensor]]) -> None:
    """An index must be true of its shards, and of two copies of a tensor name the last, which transformers loads."""
    root = files.root
    last: dict[str, Path] = {}
    for shard, tensors in found.items():
        for name in tensors:
            if name in last and name not in index:
                raise CheckpointError(
                    f"{some([last[name].name])} and {some([shard.name])} both hold {some([name])}, and "
                    f"{files.source.name} names neither: download all of them again"
                )
            last[name] = shard
    for name, file in index.items():
        if name not in found[root / file]:
            raise CheckpointError(
                f"{files.source.name} says that {some([file])} holds {some([name])}, but it does not; "
                "download both again"
            )
        if last[name] != root / file:
            raise CheckpointError(
                f"{some([file])} and {some([last[name].name])} both hold {some([name])}, and {files.source.name} "
                "names the first of them, "
                "where transformers takes the last: remove one"
            )


def _size_note(files: WeightFiles, tensors: Iterable[StoredTensor]) -> tuple[str, ...]:
    held = sum(tensor.nbytes for tensor in tensors)
    if files.total_size is None or (files.total_size == held and not isinstance(files.total_size, bool)):
        return ()
    return (f"{files.source.name} says total_size {shown(files.total_size)}, its shards' tensors have {held} bytes",)


def _unindexed_note(names: Iterable[str]) -> tuple[str, ...]:
    found = sorted(names)
    return (f"{len(found)} tensors of the shards are not in their index: {some(found)}",) if found else ()
