"""From a checkpoint folder to a bundle: the first arrow of the line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from deepseek_trt.export.bundle.folder import MANIFEST_FILE, WEIGHTS_FILE, Bundle, Manifest, SourceFile, WeightRecord
from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE, CacheSpec, GraphSpec, graphs_of
from deepseek_trt.export.bundle.interface import CLASSIFICATION, GENERATION, TRANSFORMERS, Interface
from deepseek_trt.export.bundle.recipes import LM_HEAD, too_large_for_tensorrt
from deepseek_trt.export.checkpoint import Checkpoint
from deepseek_trt.export.classifier import Classifier
from deepseek_trt.export.config import ModelConfig, read_config
from deepseek_trt.export.dtypes import dtype_of
from deepseek_trt.export.errors import BundleError, CheckpointError, ConfigError, OutputError
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.infer import config_of_tensors, task_of, written_keys
from deepseek_trt.export.writing.partial import finish, forget_inputs, partial_folder
from deepseek_trt.export.writing.tokenizer_files import carry_files
from deepseek_trt.export.writing.transformers_files import write_export_json
from deepseek_trt.export.writing.weight_file import WrittenTensor, forget_journal, weight_bytes, write_weights
from deepseek_trt.export.writing.weight_plan import WeightPlan, plan_weights

_GRAPH_BYTES = 64 * 2**20  # room for graphs and manifest
_VERSIONED = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors")


@dataclass(frozen=True)
class ExportRequest:
    """What to export. dtype None keeps the checkpoint's; num_layers None keeps all.

    The options that Interface has too are explained there; all_logits is logits_to_keep 0.
    """

    checkpoint: Path
    out: Path
    task: str = GENERATION
    dtype: str | None = None
    all_logits: bool = False
    by_reference: bool = False
    num_layers: int | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    io: str = Interface.io
    no_cache: bool = False
    inputs_embeds: bool = False
    hidden_states: bool = False
    logits_to_keep: int | None = None

    @property
    def interface(self) -> Interface:
        """What the graphs take and give. Raises ConfigError where options contradict each other."""
        if self.all_logits and self.logits_to_keep:
            raise ConfigError(f"--all-logits and --logits-to-keep {self.logits_to_keep}: leave out one of them")
        if self.by_reference and self.io == TRANSFORMERS:
            raise ConfigError(f"--io {TRANSFORMERS} is for runtimes that read the weights: leave out --by-reference")
        interface = Interface(
            task=self.task,
            io=self.io,
            cache=not self.no_cache and self.task != CLASSIFICATION,
            inputs_embeds=self.inputs_embeds,
            hidden_states=self.hidden_states,
            logits_to_keep=0 if self.all_logits else self.logits_to_keep,
        )
        interface.check()
        return interface


@dataclass(frozen=True)
class Reporter:
    """Where progress goes: `step` names what starts, with its bytes or None; `advance` counts bytes."""

    step: Callable[[str, int | None], None] = lambda text, total: None
    advance: Callable[[int], None] = lambda done: None


@dataclass(frozen=True)
class ExportResult:
    """The bundle, and whether it was made now or had been made of the same inputs before."""

    bundle: Bundle
    fresh: bool


@dataclass(frozen=True)
class _Source:
    """What is to be exported, as the headers and config.json show it."""

    checkpoint: Checkpoint
    interface: Interface
    config: ModelConfig
    classifier: Classifier | None
    plan: WeightPlan
    dtype: str
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def num_labels(self) -> int:
        return len(self.classifier.labels) if self.classifier else 0


def export_checkpoint(request: ExportRequest, report: Reporter = Reporter()) -> ExportResult:
    """Write the bundle aside, then rename it to `request.out`; on failure nothing is left behind.

    A run that was killed is continued by the next one with the same inputs. Raises ConfigError, CheckpointError or
    OutputError, each before anything large is written where that is possible.
    """
    report.step("reading headers", None)
    source = _read(request)
    existing = _existing(request.out, source.fingerprint)
    if existing is not None:
        return ExportResult(existing, fresh=False)
    weights = 0 if request.by_reference else weight_bytes(source.plan.recipes, source.dtype)
    with partial_folder(request.out, source.fingerprint, weights + _GRAPH_BYTES) as folder:
        notes = source.notes + carry_files(request.checkpoint, folder)
        shutil.copyfile(request.checkpoint / "config.json", folder / "config.json")
        if not request.by_reference:
            report.step(f"writing {WEIGHTS_FILE}", weights)
        written = () if request.by_reference else _write(source, folder, report)
        cache = CacheSpec.of(source.config, source.dtype, request.page_size)
        graphs = graphs_of(source.config, cache, source.interface, source.num_labels)
        for graph in graphs:
            report.step(f"tracing {graph.name}", None)
            _trace_to_file(source, graph, written, folder)
            if source.interface.io == TRANSFORMERS:
                write_export_json(folder, graph, source.dtype)
        forget_journal(folder)
        forget_inputs(folder)
        manifest = _manifest(request, source, cache, graphs, written, notes, folder)
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        finish(folder, request.out)
    return ExportResult(Bundle.open(request.out), fresh=True)


def _read(request: ExportRequest) -> _Source:
    interface = request.interface
    checkpoint = Checkpoint.open(request.checkpoint)
    raw = read_config(request.checkpoint / "config.json")
    declared, notes = config_of_tensors(ModelConfig.from_hf(raw), checkpoint, written_keys(raw, interface.task))
    classifier = Classifier.from_hf(raw, checkpoint) if interface.task == CLASSIFICATION else None
    _check_lm_head(interface, raw, checkpoint)
    config = _cut(declared, request.num_layers)
    labels = classifier.labels if classifier else ()
    plan = plan_weights(config, checkpoint, declared.num_hidden_layers, interface, len(labels))
    dtype = _dtype(request, plan)
    large = too_large_for_tensorrt(plan.recipes)
    if large:
        notes += (f"{len(large)} tensors hold 2^31 numbers or more, e.g. {large[0].name}: TensorRT cannot take them",)
    fingerprint = _fingerprint(request, checkpoint, dtype)
    return _Source(checkpoint, interface, config, classifier, plan, dtype, notes, fingerprint)


def _check_lm_head(interface: Interface, raw: dict[str, Any], checkpoint: Checkpoint) -> None:
    """A checkpoint of another class has no lm_head.weight either, but its embeddings are no head."""
    if interface.task != GENERATION or task_of(raw, checkpoint) == GENERATION:
        return
    name = next(iter(raw.get("architectures") or ()), "a classifier")
    raise CheckpointError(
        f"tensor {LM_HEAD} is missing: this is {name}; export it with --task {task_of(raw, checkpoint)}"
    )


def _cut(config: ModelConfig, num_layers: int | None) -> ModelConfig:
    if num_layers is None:
        return config
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ConfigError(f"--num-layers {num_layers}: the model has {config.num_hidden_layers} layers")
    return dataclasses.replace(config, num_hidden_layers=num_layers)


def _dtype(request: ExportRequest, plan: WeightPlan) -> str:
    if request.by_reference and request.dtype not in (None, plan.dtype):
        raise ConfigError(
            f"--by-reference keeps the checkpoint's dtype {plan.dtype}: leave out --dtype {request.dtype}, "
            "or export with weights"
        )
    return request.dtype or plan.dtype


def _fingerprint(request: ExportRequest, checkpoint: Checkpoint, dtype: str) -> str:
    """Of everything that decides what the bundle holds."""
    options = (request.interface, dtype, request.by_reference, request.num_layers, request.page_size)
    facts = [repr(options), importlib.metadata.version("deepseek-trt"), str(request.checkpoint.resolve())]
    facts += [repr(source) for source in _sources(checkpoint)]
    facts.append((request.checkpoint / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _sources(checkpoint: Checkpoint) -> tuple[SourceFile, ...]:
    stats = [(file.relative_to(checkpoint.root).as_posix(), file.stat()) for file in checkpoint.files]
    return tuple(SourceFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _existing(out: Path, fingerprint: str) -> Bundle | None:
    """The bundle at `out` if it was made of the same inputs; OutputError if something else lies there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        bundle = Bundle.open(out)
    except BundleError:
        bundle = None
    if bundle is None or bundle.manifest.fingerprint != fingerprint:
        raise OutputError(f"{out} is not empty: name another folder, or remove it first")
    return bundle


def _write(source: _Source, folder: Path, report: Reporter) -> tuple[WrittenTensor, ...]:
    tensors = source.checkpoint.tensors
    written = write_weights(source.plan.recipes, tensors, source.dtype, folder / WEIGHTS_FILE, report.advance)
    lost = [w for w in written if w.overflows]
    if lost:
        raise CheckpointError(
            f"{sum(w.overflows for w in lost)} weights overflow float16, e.g. in {lost[0].name}; use --dtype bfloat16"
        )
    return written


def _trace_to_file(source: _Source, graph: GraphSpec, written: tuple[WrittenTensor, ...], folder: Path) -> None:
    from deepseek_trt.export.trace import INV_FREQ, trace  # torch, and seconds to import

    model = trace(source.config, graph, source.dtype, source.interface, source.num_labels)
    places = {w.name: w for w in written}
    for recipe in source.plan.recipes:
        place = places.get(recipe.name)
        value = model.graph.initializers[recipe.name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            place.offset if place else None,
            place.nbytes if place else None,
            ir.DataType(dtype_of(recipe.dtype(source.dtype)).onnx),
            shape=ir.Shape(recipe.shape),
            name=recipe.name,
            base_dir=str(folder),
        )
    unlinked = set(model.graph.initializers) - {r.name for r in source.plan.recipes} - {INV_FREQ}
    if unlinked:
        raise AssertionError(f"initializers without a recipe: {sorted(unlinked)}")
    onnx.save(ir.to_proto(model), folder / graph.file)


def _manifest(
    request: ExportRequest,
    source: _Source,
    cache: CacheSpec,
    graphs: tuple[GraphSpec, ...],
    written: tuple[WrittenTensor, ...],
    notes: tuple[str, ...],
    folder: Path,
) -> Manifest:
    digests = {w.name: w.sha256 for w in written}
    files = sorted(p for p in folder.iterdir() if p.name != WEIGHTS_FILE and not p.is_symlink())
    recipes = source.plan.recipes
    return Manifest(
        interface=source.interface,
        dtype=source.dtype,
        by_reference=request.by_reference,
        checkpoint=str(request.checkpoint.resolve()),
        fingerprint=source.fingerprint,
        model=source.config,
        cache=cache,
        graphs=graphs,
        weights=tuple(WeightRecord(r, r.dtype(source.dtype), digests.get(r.name)) for r in recipes),
        sources=_sources(source.checkpoint),
        dropped=source.plan.dropped,
        notes=notes,
        classifier=source.classifier,
        versions={name: importlib.metadata.version(name) for name in ("deepseek-trt", *_VERSIONED)},
        files={p.name: file_sha256(p) for p in files},
    )
