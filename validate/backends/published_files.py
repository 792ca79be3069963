"""Where each published tensor of a checkpoint lies, found with json and the safetensors library alone.

It shares nothing with the export's own reading (export/reading): neither its choice of files, nor its names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OF_MODEL = re.compile(r"(?:^|\.)(layers\.\d+\..+|embed_tokens\.\w+|norm\.weight)$")
_OF_HEAD = re.compile(r"(?:^|\.)((?:lm_head|score)\.\w+)$")


@dataclass(frozen=True)
class Place:
    """A file, and the tensor's name in it."""

    file: Path
    name: str


def published_files(root: Path) -> dict[str, Place]:
    """The place of each tensor by its published name; of two with one name the last counts, as in transformers."""
    places = {}
    for file in _files(root):
        with safe_open(str(file), framework="pt") as opened:
            places.update({published_name(name): Place(file, name) for name in opened.keys()})  # noqa: SIM118
    return places


def published_name(name: str) -> str:
    """The name from where the model's own part of it begins, whatever holds the model."""
    bare = _WRAPPER.sub("", name)
    if found := _OF_MODEL.search(bare):
        return f"model.{found[1]}"
    found = _OF_HEAD.search(bare)
    return found[1] if found else bare


def _files(root: Path) -> list[Path]:
    chosen = json.loads((root / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    index = root / (chosen or "model.safetensors.index.json")
    if chosen is None and (root / "model.safetensors").is_file():
        return [root / "model.safetensors"]
    if index.name.endswith(".safetensors"):
        return [index]
    if not index.is_file():
        return sorted(file for file in root.glob("*.safetensors") if not file.name.startswith("."))
    raw: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return [root / name for name in sorted(set(raw["weight_map"].values()))]
