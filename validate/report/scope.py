"""Scope: what a verdict covers, and what it leaves out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deepseek_trt.engines.environment import cpu_name
from deepseek_trt.engines.plans.plan import has_plan
from deepseek_trt.engines.sessions.opening import choose_backend
from deepseek_trt.engines.sessions.tensorrt.cuda import visible_gpu
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.files import file_sha256
from deepseek_trt.export.reading.weight_files import CONFIG_FILE
from deepseek_trt.validate.report.checkout import tool_name
from deepseek_trt.validate.report.provenance import CheckpointFile
from deepseek_trt.validate.report.report import BackendReport, Compared, Margin, PartReport, Scope
from deepseek_trt.validate.request import DRAFTING, ValidateRequest

_UNASKED = "--backend leaves them out"


def scope_of(bundle: Bundle, request: ValidateRequest, found: Compared) -> Scope:
    config = bundle.manifest.model
    layers = _layers(config, found.parts)
    return Scope(
        layers=len(layers),
        layers_of=config.num_hidden_layers,
        not_compared=tuple(_not_compared(bundle, request, found)),
        experts=_experts_reached(found.backends),
        experts_of=sum(config.n_routed_experts for i in range(config.num_hidden_layers) if config.is_moe_layer(i)),
        tokens={backend.backend: backend.fed_tokens for backend in found.backends},
        checkpoint=_checkpoint(bundle, found),
        checkpoint_files=_checkpoint_files(bundle, found),
        machine=cpu_name(),
        tool=tool_name(),
        margin=_margin(found.backends),
    )


def _layers(config: ModelConfig, parts: Sequence[PartReport]) -> list[int]:
    """Those that were compared: all, or the parts that are layers."""
    every = range(config.num_hidden_layers)
    named = {part.part for part in parts}
    return [i for i in every if not parts or f"layer {i}" in named]


def _not_compared(bundle: Bundle, request: ValidateRequest, found: Compared) -> Iterator[str]:
    """What generate or a server may run and no backend here did."""
    ran = {backend.backend for backend in found.backends}
    generates = not bundle.manifest.generation_refusal
    if generates and "exported" not in ran:
        yield f"graphs as exported: not compared, {_UNASKED}"
    if "ort" not in ran:
        what = "compiled CPU operators" if generates else "graphs in ONNX Runtime"
        yield f"{what} (backend ort): not compared, {found.no_ort or _UNASKED}"
    if any(has_plan(bundle, graph.name) for graph in bundle.manifest.graphs) and "tensorrt" not in ran:
        yield f"TensorRT plans: not compared, {_why_no_plans(bundle, request)}"
    if bundle.manifest.speculation is not None and (request.layers is not None or not ran & set(DRAFTING)):
        why = "--layers compares the model's" if request.layers else f"{' or '.join(DRAFTING)} would compare it"
        yield f"the layer that drafts (graph mtp): not compared, {why}"
    if generates and choose_backend(bundle).backend == "ort-cuda":
        yield "ONNX Runtime's CUDA provider, which generate chooses here: not compared, validate runs it on the CPU"


def _why_no_plans(bundle: Bundle, request: ValidateRequest) -> str:
    if visible_gpu() is None:
        return "no GPU is visible"
    if bundle.manifest.generation_refusal:
        return f"validate runs no plans of a bundle for {bundle.manifest.task}"
    return "plans cannot be cut into layers" if request.layers else "--backend tensorrt compares them"


def _experts_reached(backends: Sequence[BackendReport]) -> int | None:
    """Of the backend that reached the fewest: none is credited with what another was fed. None: not seen."""
    if not all(backend.coverage for backend in backends):
        return None
    return min(sum(len(c.tokens) - len(c.missed) for c in backend.coverage) for backend in backends)


def _checkpoint(bundle: Bundle, found: Compared) -> str:
    """Its folder, and what of it was read."""
    adapter = f" with the adapter in {bundle.manifest.adapter.path} merged" if bundle.manifest.adapter else ""
    if found.weights is not None:
        return f"{found.weights.root}{adapter}"
    return f"{bundle.manifest.checkpoint}{adapter}, as export recorded it"


def _checkpoint_files(bundle: Bundle, found: Compared) -> tuple[CheckpointFile, ...]:
    """config.json, and the files that the reference read; without a reference's own, those that export recorded."""
    digests, recorded = found.integrity.checkpoint_sha256, Path(bundle.manifest.checkpoint)
    if found.weights is None:
        return tuple(CheckpointFile(s.name, s.size, s.mtime_ns, digests.get(s.name)) for s in bundle.manifest.sources)
    root = found.weights.root
    hashed = digests if root == recorded else {}
    config = root / CONFIG_FILE
    files = [_file(root, path, hashed) for path in found.weights.files]
    return (_file(root, config, {CONFIG_FILE: file_sha256(config)}), *files)


def _file(root: Path, path: Path, digests: Mapping[str, str]) -> CheckpointFile:
    stat, name = path.stat(), Path(os.path.relpath(path, root)).as_posix()
    return CheckpointFile(name, stat.st_size, stat.st_mtime_ns, digests.get(name))


def _margin(backends: Sequence[BackendReport]) -> Margin:
    share, backend, output = max(
        ((o.nearness, b.backend, o.output) for b in backends for o in b.outputs), key=lambda found: found[0]
    )
    return Margin(share, backend, output)
