"""Bundle: the folder that export writes and everything else reads, described by its manifest.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_trt.export.bundle.graph import CacheSpec, GraphSpec, TensorSpec
from deepseek_trt.export.bundle.interface import Interface
from deepseek_trt.export.bundle.recipes import Dropped, Piece, Recipe
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.config.rope import RopeConfig
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.reading.classifier import Classifier
from deepseek_trt.export.text.valid import check_place

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"  # where the bundle holds its weights itself
SCHEMA_VERSION = 3


@dataclass(frozen=True)
class WeightRecord:
    """One graph tensor and where it comes from. sha256 is None where the bundle refers to the checkpoint."""

    recipe: Recipe
    dtype: str
    sha256: str | None


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
class Manifest:
    """What a bundle is. `checkpoint` is the absolute folder that a by-reference bundle reads its weights from."""

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
    files: dict[str, str] = field(default_factory=dict)  # sha256 by name, of all files but the weights
    schema_version: int = SCHEMA_VERSION

    @property
    def task(self) -> str:
        return self.interface.task

    @property
    def all_logits(self) -> bool:
        """Whether prefill gives the logits of every token."""
        return self.interface.all_logits

    @property
    def generation_refusal(self) -> str:
        """Nothing where the bundle can generate text, else why it cannot and what to do."""
        return self.interface.why_no_generation

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        raw: dict[str, Any] = json.loads(text)
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise BundleError(
                f"manifest schema {raw.get('schema_version')!r} is not {SCHEMA_VERSION}: export the checkpoint again"
            )
        model = dict(raw["model"])
        model["rope"] = RopeConfig(**model["rope"])
        model["eos_token_ids"] = tuple(model["eos_token_ids"])
        classifier = raw["classifier"]
        if classifier is not None:
            classifier = Classifier(tuple(classifier["labels"]), classifier["problem_type"])
        adapter = raw.get("adapter")
        if adapter is not None:
            adapter = AdapterRecord(**{**adapter, "target_modules": tuple(adapter["target_modules"])})
        return cls(
            **{
                **raw,
                "adapter": adapter,
                "interface": Interface(**raw["interface"]),
                "classifier": classifier,
                "model": ModelConfig(**model),
                "cache": CacheSpec(**raw["cache"]),
                "graphs": tuple(_graph(g) for g in raw["graphs"]),
                "weights": tuple(_weight(w) for w in raw["weights"]),
                "sources": tuple(SourceFile(**s) for s in raw["sources"]),
                "dropped": tuple(Dropped(**d) for d in raw["dropped"]),
                "notes": tuple(raw["notes"]),
            }
        )


@dataclass(frozen=True)
class Bundle:
    """An exported model on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read the manifest; BundleError when there is none, or when a file that it names is missing."""
        check_place(path, BundleError)
        file = path / MANIFEST_FILE
        if not file.is_file():
            raise BundleError(f"{path} is not a bundle ({MANIFEST_FILE} is missing): make one with deepseek-trt export")
        try:
            manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BundleError(f"{file} is damaged ({error!r}): export the checkpoint again") from None
        bundle = cls(path, manifest)
        for graph in manifest.graphs:
            for path in (bundle.graph_path(graph.name), bundle.traced_path(graph.name)):
                if not path.is_file():
                    raise BundleError(f"{path} is missing: export the checkpoint again")
        return bundle

    def graph(self, name: str) -> GraphSpec:
        for graph in self.manifest.graphs:
            if graph.name == name:
                return graph
        raise BundleError(f"{self.path} has no {name} graph; it holds {[g.name for g in self.manifest.graphs]}")

    def graph_path(self, name: str) -> Path:
        """The graph for ONNX Runtime: that of a bfloat16 bundle computes in float32, over weights in bfloat16."""
        return self.path / f"{name}.onnx"

    def traced_path(self, name: str) -> Path:
        """The graph in the bundle's own dtype, for TensorRT and for whatever is made of graphs."""
        dtype = self.manifest.dtype
        return self.graph_path(name) if computed_in(dtype) == dtype else self.path / f"{name}.{dtype}.onnx"

    @property
    def tokenizer_path(self) -> Path | None:
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None


def _graph(raw: dict[str, Any]) -> GraphSpec:
    def tensors(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["dims"])) for t in entries)

    return GraphSpec(raw["name"], tensors(raw["inputs"]), tensors(raw["outputs"]))


def _weight(raw: dict[str, Any]) -> WeightRecord:
    recipe = raw["recipe"]
    pieces = tuple(Piece(**p) for p in recipe["pieces"])
    return WeightRecord(Recipe(recipe["name"], tuple(recipe["shape"]), pieces), raw["dtype"], raw["sha256"])
