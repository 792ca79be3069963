"""Checkpoint: what lies in a folder of safetensors, read from the headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.dtypes import WEIGHT_DTYPES
from deepseek_trt.export.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie. dtype is ours where we have a name, else safetensors' own (e.g. F8_E4M3)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint folder by name."""

    root: Path
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards, in order of name."""
        return tuple(sorted({t.file for t in self.tensors.values()}))

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Read the index, or the single file without one, and every shard's header.

        Raises CheckpointError for a missing or truncated shard and for an index that its shards contradict.
        """
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a folder: give the folder that holds config.json and *.safetensors")
        return cls(root, _full_names(_stored(root)))


def _stored(root: Path) -> dict[str, StoredTensor]:
    index = root / INDEX_FILE
    if index.is_file():
        return _tensors_of_index(root, index)
    single = root / SINGLE_FILE
    found = [single] if single.is_file() else sorted(root.glob("*.safetensors"))
    if len(found) == 1:  # of several without an index nobody knows which belong together
        return {t.name: t for t in read_header(found[0])}
    raise CheckpointError(f"{root} holds neither {INDEX_FILE} nor {SINGLE_FILE}: download the safetensors files")


def _full_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The published names: a model saved without its head (DeepseekV2Model) lacks their "model."."""
    if not any(name.startswith("layers.") for name in tensors):
        return tensors
    bare = ("layers.", "embed_tokens.", "norm.")
    return {f"model.{name}" if name.startswith(bare) else name: tensor for name, tensor in tensors.items()}


def _tensors_of_index(root: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}); download it again") from None
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{index.name} names {file}, which leaves {root}; download it again")
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        raise CheckpointError(f"{index.name} names {missing[0]}, which is missing in {root}; download it")
    # a tensor may lie in several shards: the index says which one counts
    found = {file: {t.name: t for t in read_header(root / file)} for file in files}
    for name, file in weight_map.items():
        if name not in found[file]:
            raise CheckpointError(f"{index.name} says that {file} holds {name}, but it does not; download both again")
    return {name: found[file][name] for name, file in weight_map.items()}


def read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors that a safetensors file says it holds; CheckpointError when the file is too short for them."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{file} is not a safetensors file, or is truncated; download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise CheckpointError(f"{file} has a damaged header; download it again") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{file} is truncated or has grown: {size} bytes, its header says {8 + length + end}; download it again"
        )
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = WEIGHT_DTYPES.get(entry["dtype"], entry["dtype"])
        yield StoredTensor(name, file, dtype, tuple(entry["shape"]), 8 + length + start, stop - start)
