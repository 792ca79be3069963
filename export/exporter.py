"""From a checkpoint folder to a bundle: the first arrow of the line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from deepseek_trt.export.bundle import MANIFEST_FILE, Bundle, Manifest, SourceFile, WeightRecord
from deepseek_trt.export.checkpoint import Checkpoint
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.errors import BundleError, CheckpointError, ConfigError, OutputError
from deepseek_trt.export.graph import DEFAULT_PAGE_SIZE, CacheSpec, GraphSpec, text_generation_graphs
from deepseek_trt.export.tokenizer_files import carry_files
from deepseek_trt.export.weight_file import WEIGHTS_FILE, WrittenTensor, weight_bytes, write_weights
from deepseek_trt.export.weights import WeightPlan, config_of_tensors, plan_weights

TASKS = ("text-generation",)
_GRAPH_BYTES = 64 * 2**20  # room for graphs and manifest
_VERSIONED = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors")


@dataclass(frozen=True)
class ExportRequest:
    """What to export. dtype None keeps the checkpoint's; num_layers None keeps all."""

    checkpoint: Path
    out: Path
    task: str = "text-generation"
    dtype: str | None = None
    all_logits: bool = False
    by_reference: bool = False
    num_layers: int | None = None
    page_size: int = DEFAULT_PAGE_SIZE


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


def export_checkpoint(request: ExportRequest, report: Reporter = Reporter()) -> ExportResult:
    """Write the bundle aside, then rename it to `request.out`; on failure nothing is left behind.

    Raises ConfigError, CheckpointError or OutputError, each before anything large is written where that is possible.
    """
    report.step("reading headers", None)
    checkpoint = Checkpoint.open(request.checkpoint)
    declared = ModelConfig.from_file(request.checkpoint / "config.json")
    config, notes = config_of_tensors(declared, checkpoint)
    config = _cut(config, request.num_layers)
    plan = plan_weights(config, checkpoint, declared.num_hidden_layers)
    dtype = _dtype(request, plan)
    fingerprint = _fingerprint(request, checkpoint, dtype)
    existing = _existing(request.out, fingerprint)
    if existing is not None:
        return ExportResult(existing, fresh=False)
    needed = _GRAPH_BYTES + (0 if request.by_reference else weight_bytes(plan.recipes, dtype))
    aside = _make_aside(request.out, needed)
    try:
        cache = CacheSpec.of(config, dtype, request.page_size)
        graphs = text_generation_graphs(config, cache, request.all_logits)
        notes += carry_files(request.checkpoint, aside)
        shutil.copyfile(request.checkpoint / "config.json", aside / "config.json")
        report.step(f"writing {WEIGHTS_FILE}", needed - _GRAPH_BYTES)
        written = () if request.by_reference else _write(plan, checkpoint, dtype, aside, report)
        for graph in graphs:
            report.step(f"tracing {graph.name}", None)
            _trace_to_file(config, graph, dtype, request.all_logits, plan, written, aside)
        manifest = _manifest(
            request, config, dtype, cache, graphs, plan, written, checkpoint, notes, fingerprint, aside
        )
        (aside / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        if request.out.exists():
            request.out.rmdir()
        aside.rename(request.out)
    except OSError as error:
        raise OutputError(f"cannot write {request.out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return ExportResult(Bundle.open(request.out), fresh=True)


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
    options = (request.task, dtype, request.all_logits, request.by_reference, request.num_layers, request.page_size)
    facts = [repr(options), importlib.metadata.version("deepseek-trt"), str(request.checkpoint.resolve())]
    facts += [repr(source) for source in _sources(checkpoint)]
    facts.append((request.checkpoint / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _sources(checkpoint: Checkpoint) -> tuple[SourceFile, ...]:
    stats = [(file.name, file.stat()) for file in checkpoint.files]
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


def _make_aside(out: Path, needed: int) -> Path:
    """A new folder beside `out`, after checking that the disk has room for `needed` bytes."""
    out = out.absolute()
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} does not exist: make it first")
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OutputError(f"{out.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from None
    return aside


def _write(
    plan: WeightPlan, checkpoint: Checkpoint, dtype: str, aside: Path, report: Reporter
) -> tuple[WrittenTensor, ...]:
    written = write_weights(plan.recipes, checkpoint.tensors, dtype, aside / WEIGHTS_FILE, report.advance)
    lost = [w for w in written if w.overflows]
    if lost:
        raise CheckpointError(
            f"{sum(w.overflows for w in lost)} weights overflow float16, e.g. in {lost[0].name}; use --dtype bfloat16"
        )
    return written


def _trace_to_file(
    config: ModelConfig,
    graph: GraphSpec,
    dtype: str,
    all_logits: bool,
    plan: WeightPlan,
    written: tuple[WrittenTensor, ...],
    aside: Path,
) -> None:
    from deepseek_trt.export.trace import INV_FREQ, trace  # torch, and seconds to import

    model = trace(config, graph, dtype, all_logits)
    places = {w.name: w for w in written}
    for recipe in plan.recipes:
        place = places.get(recipe.name)
        value = model.graph.initializers[recipe.name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            place.offset if place else None,
            place.nbytes if place else None,
            ir.DataType[_ONNX_DTYPES[dtype]],
            shape=ir.Shape(recipe.shape),
            name=recipe.name,
            base_dir=str(aside),
        )
    unlinked = set(model.graph.initializers) - {r.name for r in plan.recipes} - {INV_FREQ}
    if unlinked:
        raise AssertionError(f"initializers without a recipe: {sorted(unlinked)}")
    onnx.save(ir.to_proto(model), aside / graph.file)


_ONNX_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def _manifest(
    request: ExportRequest,
    config: ModelConfig,
    dtype: str,
    cache: CacheSpec,
    graphs: tuple[GraphSpec, ...],
    plan: WeightPlan,
    written: tuple[WrittenTensor, ...],
    checkpoint: Checkpoint,
    notes: tuple[str, ...],
    fingerprint: str,
    aside: Path,
) -> Manifest:
    digests = {w.name: w.sha256 for w in written}
    files = sorted(p for p in aside.iterdir() if p.name != WEIGHTS_FILE)
    return Manifest(
        task=request.task,
        dtype=dtype,
        all_logits=request.all_logits,
        by_reference=request.by_reference,
        checkpoint=str(request.checkpoint.resolve()),
        fingerprint=fingerprint,
        model=config,
        cache=cache,
        graphs=graphs,
        weights=tuple(WeightRecord(r, dtype, digests.get(r.name)) for r in plan.recipes),
        sources=_sources(checkpoint),
        dropped=plan.dropped,
        notes=notes,
        versions={name: importlib.metadata.version(name) for name in ("deepseek-trt", *_VERSIONED)},
        files={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    )
