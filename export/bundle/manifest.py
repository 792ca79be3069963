"""Manifest: what a bundle is, typed; manifest.json is written, amended and read here alone."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepseek_trt.export.bundle.graph import CacheSpec, GraphSpec
from deepseek_trt.export.bundle.interface import Interface
from deepseek_trt.export.bundle.narrow import FORMATS, Quantization
from deepseek_trt.export.bundle.recipes import EXPERTS, Dropped, Recipe
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.dtypes import dtype_bytes
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.files import stream_sha256
from deepseek_trt.export.reading.classifier import Classifier
from deepseek_trt.export.trust.listing import AGAIN
from deepseek_trt.export.trust.own_json import own_record, read_own
from deepseek_trt.export.trust.real_files import open_real
from deepseek_trt.export.writing.working import aside, remove_leftover

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"  # where the bundle holds its weights itself
SCHEMA_VERSION = 8
_OWN = "sha256"  # the key of the manifest's own


@dataclass(frozen=True)
class WeightRecord:
    """One graph tensor and where it comes from. sha256 is None where the bundle refers to the checkpoint."""

    recipe: Recipe
    dtype: str
    sha256: str | None


@dataclass(frozen=True)
class WeightsFile:
    """The file of the weights: its bytes, and the sha256 of its header, which says where each tensor lies."""

    size: int
    header_sha256: str


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint file as it was at export."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class AdapterRecord:
    """The LoRA adapter that was merged: its absolute folder, its files' sha256 by name, and what it is.

    `modules` counts those with LoRA, `replaced` the weights that were trained whole.
    """

    path: str
    files: dict[str, str]
    r: int
    alpha: float
    target_modules: tuple[str, ...]
    modules: int
    replaced: int


@dataclass(frozen=True)
class Speculation:
    """How the bundle can draft its own tokens: by the layer of multi-token prediction of that number, once or again."""

    kind: Literal["mtp"]
    layer: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle is. `checkpoint` is the absolute folder that a by-reference bundle reads its weights from.

    `files` and `added` hold the sha256 by name of all files but the weights: what export wrote, and what later commands
    put beside it, such as plans. Nothing else of the folder is opened.
    """

    interface: Interface
    dtype: str
    by_reference: bool
    checkpoint: str
    fingerprint: str
    model: ModelConfig
    cache: CacheSpec
    graphs: tuple[GraphSpec, ...]
    weights: tuple[WeightRecord, ...]
    sources: tuple[SourceFile, ...]
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    classifier: Classifier | None = None  # of the task text-classification
    adapter: AdapterRecord | None = None
    quantization: Quantization | None = None  # what made weights narrow
    weights_file: WeightsFile | None = None  # None where the bundle refers to the checkpoint
    speculation: Speculation | None = None  # of an export with --mtp
    files: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def task(self) -> str:
        return self.interface.task

    @property
    def main_weights(self) -> tuple[WeightRecord, ...]:
        """Those of prefill and decode: all but the drafting layer's own."""
        return tuple(weight for weight in self.weights if not self._drafts(weight.recipe.name))

    @property
    def drafting_weights(self) -> tuple[WeightRecord, ...]:
        """Those that the graph "mtp" alone has; embeddings and output matrix are the model's."""
        return tuple(weight for weight in self.weights if self._drafts(weight.recipe.name))

    def _drafts(self, name: str) -> bool:
        return self.speculation is not None and name.startswith(f"model.layers.{self.speculation.layer}.")

    @property
    def is_narrow(self) -> bool:
        """Whether weights are codes and scales."""
        return self.quantization is not None

    @property
    def narrow_formats(self) -> tuple[str, ...]:
        """Of the weights that are codes and scales."""
        return tuple(sorted({w.recipe.narrow.format for w in self.weights if w.recipe.narrow is not None}))

    def rounds_tokens(self, left: Iterable[str]) -> bool:
        """Whether compiled operators take tokens as integers, as they do beside codes that are whole numbers.

        `left` names the nodes of a graph that they do not compute.
        """
        takes_integers = any(not FORMATS[name].is_blocks for name in self.narrow_formats)
        return (
            takes_integers and len({n for n in left if "Narrow" in n and not n.startswith("Mla")}) < self._narrow_nodes
        )

    @property
    def _narrow_nodes(self) -> int:
        """Nodes of each graph that take narrow weights: one a linear layer, one a layer of experts."""
        names = [w.recipe.name for w in self.weights if w.recipe.narrow is not None and not w.recipe.is_scales]
        stacks = sum(EXPERTS in name for name in names)
        return len(names) - stacks + stacks // 3

    @property
    def parameters(self) -> int:
        """Numbers of the model in its graphs, however they are stored."""
        return sum(weight.recipe.numbers for weight in self.weights)

    @property
    def whole_bytes(self) -> int:
        """Bytes that the weights would take if none were narrow."""
        return sum(w.recipe.numbers * dtype_bytes(self.dtype if w.recipe.narrow else w.dtype) for w in self.weights)

    @property
    def all_logits(self) -> bool:
        """Whether prefill gives the logits of every token."""
        return self.interface.all_logits

    @property
    def generation_refusal(self) -> str:
        """Nothing where the bundle can generate text, else why it cannot and what to do."""
        return self.interface.why_no_generation

    def to_json(self) -> str:
        """With the sha256 of all of it, so that a number that somebody changed is seen."""
        raw = dataclasses.asdict(self)
        return json.dumps({**raw, _OWN: sha256_of(raw)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the bundle in `folder`. Raises BundleError naming file and key where it is damaged."""
        path = folder / MANIFEST_FILE
        raw = read_own(folder, MANIFEST_FILE, BundleError, AGAIN)
        digest = raw.pop(_OWN, None)
        manifest = own_record(cls, raw, ("schema_version", SCHEMA_VERSION), path, BundleError, AGAIN)
        if digest != sha256_of(raw):
            raise BundleError(f"{path} was changed since it was written ({_OWN} is not that of the rest): {AGAIN}")
        return manifest


def sha256_of(raw: Mapping[str, Any]) -> str:
    """Of a manifest's content as JSON, whatever its layout and order."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def list_added(folder: Path, names: Iterable[str]) -> Manifest:
    """List files that a command put into the bundle, or made anew, as they are now; gives the bundle's new manifest.

    Commands may do so at the same time. What no longer lies there is listed no more.
    """
    with _locked(folder):
        manifest = Manifest.read(folder)
        kept = {name: digest for name, digest in manifest.added.items() if (folder / name).is_file()}
        added = {**kept, **{name: _sha256(folder, name) for name in names}}
        if added == manifest.added:
            remove_leftover(folder / MANIFEST_FILE)
            return manifest
        manifest = dataclasses.replace(manifest, added=dict(sorted(added.items())))
        write_manifest(folder, manifest)
        return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Whole or not at all."""
    with aside(folder / MANIFEST_FILE) as draft:
        draft.write_text(manifest.to_json(), encoding="utf-8", errors="backslashreplace")  # JSON's own escapes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else lists files of the folder meanwhile; the lock ends with the process, however that ends."""
    while True:
        with open_real(folder, MANIFEST_FILE, BundleError, AGAIN) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(stream.fileno()), (folder / MANIFEST_FILE).lstat()):  # not replaced meanwhile
                yield
                return


def _sha256(folder: Path, name: str) -> str:
    with open_real(folder, name, BundleError, "make it again") as stream:
        return stream_sha256(stream)
