"""The bundle's files in a repository: real ones, hard-linked where the disk allows it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from deepseek_trt.engines.plans.plan import PlanRecord
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, PLUGINS_FOLDER

_PLANS = (".plan", ".plan.json", ".plan.tmp")


def carried_files(bundle: Bundle, backend: str) -> list[Path]:
    """Every file that a repository for `backend` takes from the bundle, and the plugin libraries of its plans."""
    if backend != "tensorrt":
        return _bundle_files(bundle)
    records = [bundle.path / f"{graph.name}.plan.json" for graph in bundle.manifest.graphs]
    beside = {file for record in records for file in _plugin_files(bundle, PlanRecord.read(record))}
    return [*_bundle_files(bundle), *(file.with_suffix("") for file in records), *records, *sorted(beside)]


def place_bundle(bundle: Bundle, backend: str, target: Path) -> None:
    """Make the folder `target`, and in it all that a session of `backend` reads."""
    target.mkdir(parents=True)
    for file in _bundle_files(bundle):
        _place(file, target / file.name)
    if backend == "tensorrt":
        _place_plans(bundle, target)
        _place_compiled(bundle, target)  # they sample
    else:
        _place_prepared(bundle, target)


def _bundle_files(bundle: Bundle) -> list[Path]:
    """What every backend needs: the folder's files but plans; plugin libraries lie in a folder of their own."""
    return sorted(file for file in bundle.path.iterdir() if file.is_file() and not file.name.endswith(_PLANS))


def _place(source: Path, target: Path) -> None:
    """A hard link where both lie on one disk, else a copy; never a symbolic link."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(real, target)


def _place_plans(bundle: Bundle, target: Path) -> None:
    """Place plans, their plugin libraries, and records that name the library where it lies in the repository."""
    for graph in bundle.manifest.graphs:
        plan = bundle.path / f"{graph.name}.plan"
        record = PlanRecord.read(plan.with_suffix(".plan.json"))
        for file in _plugin_files(bundle, record):
            placed = target / PLUGINS_FOLDER / file.name
            placed.parent.mkdir(exist_ok=True)
            if not placed.exists():  # another graph's plan wants it, too
                _place(file, placed)
        _place(plan, target / plan.name)
        named = dataclasses.replace(record, plugin_library=f"{PLUGINS_FOLDER}/{LIBRARY}")
        named.write(target / f"{plan.name}.json")


def _plugin_files(bundle: Bundle, record: PlanRecord) -> tuple[Path, ...]:
    """The plugin library that a plan wants beside it, and the library's manifest."""
    if record.spec.embed_plugins:
        return ()
    library = (bundle.path / record.plugin_library).resolve()
    return library, library.with_name(MANIFEST)


def _place_prepared(bundle: Bundle, target: Path) -> None:
    """Place the graphs that ONNX Runtime's sessions make at load: the server's Python has no onnx.

    Decode goes through the compiled operators where they take over all of it; bfloat16 is computed in float32.
    """
    from deepseek_trt.engines.sessions.prepared import fused_path, widened_path
    from deepseek_trt.export.passes.widen import widened_bytes
    from deepseek_trt.plugins.cpu.fuse import fused_bytes

    placed = dataclasses.replace(bundle, path=target)
    graphs = [graph.name for graph in bundle.manifest.graphs]
    if "decode" in graphs:
        fused, left = fused_bytes(bundle.graph_path("decode"))
        if not left and _place_compiled(bundle, target):
            fused_path(placed).write_bytes(fused)
    if bundle.manifest.dtype == "bfloat16":
        for graph in graphs:
            widened_path(placed, graph).write_bytes(widened_bytes(bundle.graph_path(graph)))


def _place_compiled(bundle: Bundle, target: Path) -> bool:
    """Place the compiled CPU operators, as the server's machine may have no compiler; False where there are none."""
    from deepseek_trt.plugins.cpu.library import CPU_LIBRARY_FILE, cpu_library_path

    library = cpu_library_path(bundle.path)
    if library is not None:
        _place(library, target / CPU_LIBRARY_FILE)
    return library is not None
