"""Which files of a folder hold its weights: those that transformers loads, and what lies beside them unread.

transformers (_get_resolved_checkpoint_files) takes the file that config.json's transformers_weights names, else
model.safetensors, else the shards of model.safetensors.index.json; variants (model.fp16.safetensors) only on request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.json_file import read_object
from deepseek_trt.export.text.wording import shown, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_MAX_INDEX = 256 * 2**20  # bytes; 20 MB are an index of 150,000 tensors
CHOICE_KEY = "transformers_weights"  # of config.json: the file to load in place of the usual ones
_INDEX_ENDING = ".safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # what transformers loads where it finds neither
_WEIGHTS = re.compile(
    r".*\.(safetensors|gguf|pth|msgpack|distcp)|.*\.safetensors\.index\.json|(pytorch_model|consolidated).*|.*model.*\.h5"
)
_SHARD = re.compile(r".*-of-0*(\d+)\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The shards to read; `index` says which of them holds a tensor, None where there is one file and no index.

    `source` is the file that said so, `total_size` what an index says of all tensors' bytes, if anything. `ignored`
    are the names of other weights that lie in the folder.
    """

    root: Path
    source: Path
    shards: tuple[Path, ...]
    index: dict[str, str] | None
    ignored: tuple[str, ...]
    total_size: Any = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read, where something else lies beside it."""
        if not self.ignored:
            return ()
        many = f"the {len(self.shards)} files that {self.source.name} names"
        read = self.source.name if self.index is None else many
        return (f"the weights are read from {read}, as transformers reads them; ignored: {some(self.ignored, 6)}",)


def find_weight_files(root: Path) -> WeightFiles:
    """Look at the names in the folder `root`, and into an index.

    Raises CheckpointError where nobody can say which files belong together, or where one that is named is missing.
    """
    source = _chosen(root) or _usual(root) or _only(root)
    index, size = _read_index(root, source) if source.name.endswith(_INDEX_ENDING) else (None, None)
    shards = (source,) if index is None else tuple(root / name for name in sorted(set(index.values())))
    read = {source.name, *(shard.relative_to(root).as_posix() for shard in shards)}
    return WeightFiles(root, source, shards, index, tuple(name for name in weights_in(root) if name not in read), size)


def weights_in(root: Path) -> Iterator[str]:
    """The names in the folder that some program reads weights from, in order."""
    return (path.name for path in sorted(root.iterdir()) if path.name[0] != "." and _WEIGHTS.fullmatch(path.name))


def _chosen(root: Path) -> Path | None:
    """The file that config.json names."""
    try:
        name = read_object(root / CONFIG_FILE, CheckpointError, nan=True).get(CHOICE_KEY)
    except (CheckpointError, FileNotFoundError):
        return None  # what is wrong with config.json is said by who reads it
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", _INDEX_ENDING)):
        raise CheckpointError(f"config.json: {CHOICE_KEY} is {shown(name)}, which is no safetensors file or index")
    return _inside(root, name, f"config.json's {CHOICE_KEY}")


def _usual(root: Path) -> Path | None:
    for name in (SINGLE_FILE, INDEX_FILE):
        file = root / name
        if file.is_symlink() and not file.exists():
            raise CheckpointError(f"{file} is a link to a file that is not there: download it again")
        if file.exists():
            return file
    return None


def _only(root: Path) -> Path:
    """The one safetensors file, whatever its name: of several without an index nobody knows which belong together."""
    found = [name for name in weights_in(root) if name.endswith(".safetensors")]
    neither = f"{root} holds neither {INDEX_FILE} nor {SINGLE_FILE}"
    if len(found) != 1:
        among = f", which says how {some(found)} belong together" if found else ""
        raise CheckpointError(f"{neither}{among}: download the safetensors files")
    shard = _SHARD.fullmatch(found[0])
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{neither}, and {found[0]} is one of {int(shard[1])} shards: download all of them")
    pickles = [name for name in _PICKLES if (root / name).exists()]
    if pickles:
        raise CheckpointError(
            f"{neither}: transformers would load {pickles[0]}, and not {found[0]}; "
            f"name the file {SINGLE_FILE} if it holds the model, or take the others away"
        )
    return root / found[0]


def _read_index(root: Path, index: Path) -> tuple[dict[str, str], Any]:
    """The file of each tensor, by the tensor's name; and the total_size that is written beside them."""
    try:
        raw = read_object(index, CheckpointError, _MAX_INDEX)
    except (CheckpointError, FileNotFoundError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({shown(str(error))}); download it again") from None
    weight_map, metadata = raw.get("weight_map"), raw.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not a safetensors index (no weight_map); download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index.name} says that {shown(name)} lies in {shown(file)}; download it again")
    for file in sorted(set(weight_map.values())):
        _inside(root, file, index.name)
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _inside(root: Path, name: str, said_by: str) -> Path:
    """The file of that name in the folder; CheckpointError where it is elsewhere, or missing."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{said_by} names {shown(name)}, which leaves {root}; download it again")
    if not (root / name).exists():
        raise CheckpointError(f"{said_by} names {some([name])}, which is missing in {root}; download it")
    return root / name
