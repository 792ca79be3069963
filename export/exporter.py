"""Export: a checkpoint folder becomes a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from deepseek_trt.export.bundle.folder import (
    WEIGHTS_FILE,
    AdapterRecord,
    Bundle,
    Manifest,
    SourceFile,
    WeightRecord,
    WeightsFile,
)
from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE, CacheSpec, GraphSpec, graphs_of
from deepseek_trt.export.bundle.interface import CLASSIFICATION, TRANSFORMERS, Interface
from deepseek_trt.export.bundle.manifest import Speculation, write_manifest
from deepseek_trt.export.bundle.narrow import NONE
from deepseek_trt.export.bundle.proof import remember_weights
from deepseek_trt.export.bundle.recipes import EMBEDDINGS, LM_HEAD, Recipe
from deepseek_trt.export.dtypes import computed_in, dtype_of
from deepseek_trt.export.errors import BundleError, CheckpointError, ConfigError, OutputError
from deepseek_trt.export.files import file_sha256, stream_sha256
from deepseek_trt.export.mtp.copies import check_alone, check_copies
from deepseek_trt.export.passes.widen import WidenBfloat16
from deepseek_trt.export.reading.adapter import Adapter
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.hub import checkpoint_folder
from deepseek_trt.export.reading.source import Source, export_dtype, read_source
from deepseek_trt.export.writing.carried_files import carried_digests, carry_files
from deepseek_trt.export.writing.numbers_seen import Allowed, judge_numbers
from deepseek_trt.export.writing.partial import check_out, finish, partial_folder
from deepseek_trt.export.writing.transformers_files import write_export_json
from deepseek_trt.export.writing.weight_file import JOURNAL_FILE, write_weights
from deepseek_trt.export.writing.working import clear, remove_leftover
from deepseek_trt.export.writing.written import WrittenTensor

_GRAPH_BYTES = 64 * 2**20  # room for graphs and manifest
_UNREAD = "the weights' numbers were not read: validate looks for NaN, infinities and tensors of zeros"
_VERSIONED = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors")


@dataclass(frozen=True)
class ExportRequest:
    """What to export. task None is the checkpoint's own; dtype None keeps the checkpoint's; num_layers None keeps all.

    `checkpoint` is a folder, or a name on Hugging Face's hub that the local cache holds. `adapter` is a LoRA folder of
    peft to merge. allow_nonfinite goes on with weights that are NaN or infinite, allow_zeros with matrices and norms
    of zeros alone; both make a note. `quantize` says what weights become narrow: "int8", "int4", "fp8", "keep" (a
    checkpoint's own fp8), or the path of a JSON file of rules (docs/narrow.md); None keeps fp8 where it can be, which
    "none" dequantises. The options of Interface are explained there; all_logits is logits_to_keep 0, mtp adds the layer
    of multi-token prediction, cache_dtype None keeps the cache whole.
    """

    checkpoint: Path
    out: Path
    task: str | None = None
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
    adapter: Path | None = None
    allow_nonfinite: bool = False
    allow_zeros: bool = False
    quantize: str | None = None
    mtp: bool = False
    cache_dtype: str | None = None

    @property
    def allowed(self) -> Allowed:
        return Allowed(self.allow_nonfinite, self.allow_zeros)

    def interface(self, task: str) -> Interface:
        """What the graphs of that task take and give. Raises ConfigError where options contradict each other."""
        if self.all_logits and self.logits_to_keep:
            raise ConfigError(f"--all-logits and --logits-to-keep {self.logits_to_keep}: leave out one of them")
        if self.by_reference and self.io == TRANSFORMERS:
            raise ConfigError(f"--io {TRANSFORMERS} is for runtimes that read the weights: leave out --by-reference")
        interface = Interface(
            task=task,
            io=self.io,
            cache=not self.no_cache and task != CLASSIFICATION,
            inputs_embeds=self.inputs_embeds,
            hidden_states=self.hidden_states,
            logits_to_keep=0 if self.all_logits else self.logits_to_keep,
            mtp=self.mtp,
            cache_dtype=self.cache_dtype or "",
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
class _Job:
    """One export: what was asked for, what the checkpoint is, and what follows from both."""

    request: ExportRequest
    source: Source
    dtype: str
    adapter: AdapterRecord | None
    fingerprint: str

    @property
    def cache(self) -> CacheSpec:
        interface = self.source.interface
        return CacheSpec.of(
            self.source.config, self.dtype, self.request.page_size, interface.mtp, interface.cache_dtype
        )

    @property
    def graphs(self) -> tuple[GraphSpec, ...]:
        return graphs_of(self.source.config, self.cache, self.source.interface, self.source.num_labels)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights file: none where the bundle refers to the checkpoint."""
        return 0 if self.request.by_reference else sum(r.nbytes(self.dtype) for r in self.source.plan.recipes)


def export_bundle(request: ExportRequest, report: Reporter = Reporter()) -> ExportResult:
    """Write the bundle aside, then rename it to `request.out`; on failure nothing is left behind.

    A run that was killed is continued by the next one with the same inputs. Raises ConfigError, CheckpointError or
    OutputError, each before anything large is written where that is possible.
    """
    report.step("reading headers", None)
    job = _plan(request)
    existing = _existing(request.out, job.fingerprint)
    if existing is not None:
        remove_leftover(request.out)
        return ExportResult(existing, fresh=False)
    check_out(request.out)
    if job.source.interface.mtp:
        check_copies(job.source.config, job.source.checkpoint)
    with partial_folder(request.out, job.fingerprint, job.weight_bytes + _GRAPH_BYTES) as folder:
        _fill(folder, job, report)
        _check_unchanged(job)
        finish(folder, request.out)
    bundle = Bundle.open(request.out)
    remember_weights(bundle.path, bundle.manifest)
    return ExportResult(bundle, fresh=True)


def _plan(request: ExportRequest) -> _Job:
    request = dataclasses.replace(request, checkpoint=checkpoint_folder(request.checkpoint))
    if request.by_reference and request.allowed != Allowed():
        raise ConfigError("--by-reference reads no numbers: leave out --allow-nonfinite and --allow-zeros")
    if request.by_reference and request.quantize not in (None, NONE):
        raise ConfigError("--quantize writes codes and scales of its own: leave out --by-reference")
    if request.mtp:
        check_alone(by_reference=request.by_reference)
    if request.allow_nonfinite and request.quantize not in (None, NONE):
        raise ConfigError("--quantize has no codes for NaN and infinities: leave out --allow-nonfinite")
    wanted = request.interface if request.task is None else request.interface(request.task)
    keep = not (request.by_reference or request.allow_nonfinite)  # fp8 is kept where nothing else is asked for
    source = read_source(request.checkpoint, wanted, request.num_layers, request.adapter, request.quantize, keep)
    dtype = export_dtype(source, request.dtype, request.by_reference)
    adapter = _record(source.adapter) if source.adapter else None
    return _Job(request, source, dtype, adapter, _fingerprint(request, source, dtype, adapter))


def _record(adapter: Adapter) -> AdapterRecord:
    targets = adapter.config.targets
    return AdapterRecord(
        path=str(adapter.root.resolve()),
        files={file.name: file_sha256(file) for file in adapter.files},
        r=adapter.config.r,
        alpha=adapter.config.alpha,
        target_modules=(targets,) if isinstance(targets, str) else targets,
        modules=len(adapter.pairs),
        replaced=len(adapter.replaced),
    )


def _fingerprint(request: ExportRequest, source: Source, dtype: str, adapter: AdapterRecord | None) -> str:
    """The sha256 of everything that decides what the bundle holds."""
    options = (source.interface, dtype, request.by_reference, request.num_layers, request.page_size)
    facts = [repr((options, adapter, request.allowed, source.quantization)), importlib.metadata.version("deepseek-trt")]
    facts.append(str(request.checkpoint.resolve()))
    facts += [repr(file) for file in _sources(source.checkpoint)]
    facts += [repr(file) for file in carried_digests(request.checkpoint)]
    facts.append((request.checkpoint / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(facts).encode("utf-8", "backslashreplace")).hexdigest()


def _check_unchanged(job: _Job) -> None:
    """Whoever writes to a checkpoint while it is exported gets no bundle of halves."""
    adapter = _record(job.source.adapter) if job.source.adapter else None
    if _fingerprint(job.request, job.source, job.dtype, adapter) != job.fingerprint:
        raise CheckpointError(f"{job.request.checkpoint} changed while it was exported: export it again")


def _sources(checkpoint: Checkpoint) -> tuple[SourceFile, ...]:
    stats = [(file.relative_to(checkpoint.root).as_posix(), file.stat()) for file in checkpoint.files]
    return tuple(SourceFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _existing(out: Path, fingerprint: str) -> Bundle | None:
    """The bundle at `out` if it was made of the same inputs; OutputError if something else lies there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    with suppress(BundleError):
        bundle = Bundle.open(out)
        if bundle.manifest.fingerprint == fingerprint:
            return bundle
    raise OutputError(f"{out} is not empty: name another folder, or remove it first")


def _fill(folder: Path, job: _Job, report: Reporter) -> None:
    """Write all files of the bundle, its manifest last."""
    checkpoint = job.request.checkpoint
    clear(folder, but=(WEIGHTS_FILE, JOURNAL_FILE))  # all else of a run that was killed is made anew
    carry_files(checkpoint, folder)
    written, seen = ((), (_UNREAD,)) if job.request.by_reference else _write_weights(job, folder, report)
    for graph in job.graphs:
        report.step(f"tracing {graph.name}", None)
        _trace_to_file(job, graph, written, folder)
        if job.source.interface.io == TRANSFORMERS:
            write_export_json(folder, graph.as_computed(), computed_in(job.dtype))
    (folder / JOURNAL_FILE).unlink(missing_ok=True)  # only a continued run reads it
    write_manifest(folder, _manifest(job, written, seen, folder))


def _write_weights(job: _Job, folder: Path, report: Reporter) -> tuple[tuple[WrittenTensor, ...], tuple[str, ...]]:
    """What was written, and what is to be noted of its numbers."""
    report.step(f"writing {WEIGHTS_FILE}", job.weight_bytes)
    recipes, tensors = job.source.plan.recipes, job.source.checkpoint.tensors
    written = write_weights(recipes, tensors, job.dtype, folder / WEIGHTS_FILE, report.advance)
    odd = [numbers for tensor in written for numbers in tensor.odd]
    return written, judge_numbers(odd, recipes, tensors, job.dtype, job.request.allowed)


def _trace_to_file(job: _Job, graph: GraphSpec, written: tuple[WrittenTensor, ...], folder: Path) -> None:
    # torch, and seconds to import
    from deepseek_trt.export.passes.narrow import NarrowWeights
    from deepseek_trt.export.trace import INV_FREQ, trace

    source, places = job.source, {w.name: (w.offset, w.nbytes) for w in written}
    model = trace(source.config, graph, job.dtype, source.interface, source.num_labels)
    if source.quantization is not None:
        NarrowWeights(source.plan.recipes)(model)
    for recipe in _recipes_of(graph, source):
        offset, nbytes = places.get(recipe.name, (None, None))
        model.graph.initializers[recipe.name].const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            offset,
            nbytes,
            ir.DataType(dtype_of(recipe.dtype(job.dtype)).onnx),
            shape=ir.Shape(recipe.shape),
            name=recipe.name,
            base_dir=str(folder),
        )
    unlinked = set(model.graph.initializers) - {r.name for r in source.plan.recipes} - {INV_FREQ}
    if unlinked:
        raise AssertionError(f"initializers without a recipe: {sorted(unlinked)}")
    _save(model, graph, job, folder)


def _recipes_of(graph: GraphSpec, source: Source) -> tuple[Recipe, ...]:
    """The tensors that the graph has: all, or beside a graph "mtp" those of either kind."""
    layer, shared = f"model.layers.{source.config.num_hidden_layers}.", (EMBEDDINGS, LM_HEAD)
    if graph.name == "mtp":
        return tuple(r for r in source.plan.recipes if r.name.startswith(layer) or r.name in shared)
    return tuple(r for r in source.plan.recipes if not r.name.startswith(layer))


def _save(model: ir.Model, graph: GraphSpec, job: _Job, folder: Path) -> None:
    """The graph that ONNX Runtime loads, and beside it the traced one where that is another."""
    if computed_in(job.dtype) != job.dtype:
        onnx.save(ir.to_proto(model), folder / f"{graph.name}.{job.dtype}.onnx")
        WidenBfloat16()(model)
    onnx.save(ir.to_proto(model), folder / graph.file)


def _manifest(job: _Job, written: tuple[WrittenTensor, ...], seen: tuple[str, ...], folder: Path) -> Manifest:
    digests = {w.name: w.sha256 for w in written}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != WEIGHTS_FILE and not p.is_symlink())
    source = job.source
    return Manifest(
        interface=source.interface,
        dtype=job.dtype,
        by_reference=job.request.by_reference,
        checkpoint=str(job.request.checkpoint.resolve()),
        fingerprint=job.fingerprint,
        model=source.config,
        cache=job.cache,
        graphs=job.graphs,
        weights=tuple(WeightRecord(r, r.dtype(job.dtype), digests.get(r.name)) for r in source.plan.recipes),
        sources=_sources(source.checkpoint),
        dropped=source.plan.dropped,
        notes=source.notes + seen,
        classifier=source.classifier,
        adapter=job.adapter,
        quantization=source.quantization,
        speculation=Speculation("mtp", source.config.num_hidden_layers) if source.interface.mtp else None,
        weights_file=None if job.request.by_reference else _weights_file(folder / WEIGHTS_FILE, written),
        versions={name: importlib.metadata.version(name) for name in ("deepseek-trt", *_VERSIONED)},
        files={p.relative_to(folder).as_posix(): file_sha256(p) for p in files},
    )


def _weights_file(path: Path, written: tuple[WrittenTensor, ...]) -> WeightsFile:
    """What is not said of each tensor: the header ends where the first one begins."""
    with path.open("rb") as stream:
        return WeightsFile(path.stat().st_size, stream_sha256(stream, min(w.offset for w in written)))
