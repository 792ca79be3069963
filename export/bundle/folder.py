"""Bundle: the folder that export writes and everything else reads; its files are opened here alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from deepseek_trt.export.bundle.consistency import flaw_of, graph_files
from deepseek_trt.export.bundle.graph import GraphSpec
from deepseek_trt.export.bundle.manifest import MANIFEST_FILE as MANIFEST_FILE
from deepseek_trt.export.bundle.manifest import WEIGHTS_FILE as WEIGHTS_FILE
from deepseek_trt.export.bundle.manifest import AdapterRecord as AdapterRecord
from deepseek_trt.export.bundle.manifest import Manifest as Manifest
from deepseek_trt.export.bundle.manifest import SourceFile as SourceFile
from deepseek_trt.export.bundle.manifest import WeightRecord as WeightRecord
from deepseek_trt.export.bundle.manifest import WeightsFile as WeightsFile
from deepseek_trt.export.bundle.proof import Progress, check_size, no_progress, prove_weights
from deepseek_trt.export.errors import BundleError, DeepseekTrtError
from deepseek_trt.export.text.files import CARRIED, TEMPLATES_FOLDER, TOKENIZER
from deepseek_trt.export.text.valid import check_place
from deepseek_trt.export.trust.cache import say_once
from deepseek_trt.export.trust.listing import AGAIN, Listing
from deepseek_trt.export.writing.working import scratch_folder

_USED = (".onnx", ".plan", ".so", ".jinja")  # what is of use to somebody, beside CARRIED; other files do no harm
_REMADE = "make it again with the command that made it"


@dataclass(frozen=True)
class Bundle:
    """An exported model on disk."""

    path: Path
    manifest: Manifest
    judges_weights: bool = False

    @classmethod
    def open(
        cls, path: Path, verify: bool = False, progress: Progress = no_progress, judges_weights: bool = False
    ) -> Bundle:
        """Read the manifest and compare every file that export wrote with it, the weights by their size.

        `verify` hashes the weights and what was added later, too; `progress` is told of their bytes. `judges_weights`
        is for who hashes the weights apart from this. Raises BundleError for what is missing, changed
        or no file, naming it.
        """
        check_place(path, BundleError)
        if not os.path.lexists(path / MANIFEST_FILE):
            raise BundleError(f"{path} is not a bundle ({MANIFEST_FILE} is missing): make one with deepseek-trt export")
        manifest = Manifest.read(path)
        flaw = flaw_of(manifest)
        if flaw:
            raise BundleError(f"{path / MANIFEST_FILE}: {flaw}: {AGAIN}")
        bundle = cls(path, manifest, judges_weights)
        bundle.files.check(manifest.files)
        check_size(path, manifest)
        for name in sorted(_unlisted(path, bundle.files)):
            say_once(f"{path} holds {name!r}, which its {MANIFEST_FILE} does not list: it is not used")
        if verify:
            bundle.files.check(manifest.added, _REMADE)
            prove_weights(path, manifest, progress, anew=True)
        return bundle

    def prove_weights(self, progress: Progress = no_progress) -> None:
        """BundleError unless the weights are those that the manifest lists; hashed once, and when the file changed."""
        if not self.judges_weights:
            prove_weights(self.path, self.manifest, progress)

    def listed_anew(self) -> Bundle:
        """The bundle with what commands have added by now."""
        return replace(self, manifest=replace(self.manifest, added=Manifest.read(self.path).added))

    @cached_property
    def files(self) -> Listing:
        """Every file but the weights: by name, as listed, or not at all."""
        return Listing(self.path, {**self.manifest.files, **self.manifest.added}, MANIFEST_FILE)

    def graph(self, name: str) -> GraphSpec:
        for graph in self.manifest.graphs:
            if graph.name == name:
                return graph
        raise BundleError(f"{self.path} has no {name} graph; it holds {[g.name for g in self.manifest.graphs]}")

    def graph_bytes(self, name: str) -> bytes:
        """The graph for ONNX Runtime: that of a bfloat16 bundle computes in float32, over weights in bfloat16."""
        return self.files.read(self.graph_path(name).name)

    def traced_bytes(self, name: str) -> bytes:
        """The graph in the bundle's own dtype, for TensorRT and for whatever is made of graphs."""
        return self.files.read(self.traced_path(name).name)

    def graph_path(self, name: str) -> Path:
        """Where `graph_bytes` lie, for messages and for who reads no more than the name."""
        return self.path / graph_files(self.graph(name), self.manifest.dtype)[0]

    def traced_path(self, name: str) -> Path:
        """Where `traced_bytes` lie."""
        return self.path / graph_files(self.graph(name), self.manifest.dtype)[-1]

    @property
    def tokenizer_path(self) -> Path | None:
        return self.path / TOKENIZER if TOKENIZER in self.files else None

    @contextmanager
    def text_folder(self) -> Iterator[Path]:
        """A folder, for a moment, of the bundle's text files as they are listed; errors name the bundle's own."""
        with scratch_folder() as folder:
            for file in filter(_is_text, self.files.sha256):
                copy = folder / file
                copy.parent.mkdir(exist_ok=True)
                copy.write_bytes(self.files.read(file))
            try:
                yield folder
            except DeepseekTrtError as wrong:
                raise type(wrong)(str(wrong).replace(str(folder), str(self.path))) from None


def _is_text(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return name in CARRIED or (folder == TEMPLATES_FOLDER and file.endswith(".jinja"))


def _unlisted(path: Path, files: Listing) -> Iterator[str]:
    """Names of what somebody may expect to be used."""
    for folder in ("", "plugins/", f"{TEMPLATES_FOLDER}/"):
        try:
            found = os.listdir(path / folder)
        except OSError:
            continue
        for name in (folder + file for file in found if not file.startswith(".")):
            if name not in files and (name.endswith(_USED) or name in CARRIED):
                yield name
