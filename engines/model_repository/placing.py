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


def bundle_files(bundle: Bundle) -> list[Path]:
    """What every backend needs: the folder's files but plans; plugin libraries lie in a folder of their own."""
    return sorted(file for file in bundle.path.iterdir() if file.is_file() and not file.name.endswith(_PLANS))


def plan_files(bundle: Bundle) -> list[Path]:
    """Plans, their records, and the plugin libraries that they want, with manifests."""
    records = [bundle.path / f"{graph.name}.plan.json" for graph in bundle.manifest.graphs]
    libraries = {_library(bundle, PlanRecord.read(file)) for file in records} - {None}
    beside = [file for library in libraries if library for file in (library, library.with_name(MANIFEST))]
    return [*(file.with_suffix("") for file in records), *records, *beside]


def place_bundle(bundle: Bundle, backend: str, target: Path) -> None:
    """Fill the folder `target`, which is there."""
    for file in bundle_files(bundle):
        place(file, target / file.name)
    if backend == "tensorrt":
        _place_plans(bundle, target)
        _place_compiled(bundle, target)  # they sample
    else:
        _place_prepared(bundle, target)


def place(source: Path, target: Path) -> None:
    """A hard link where both lie on one disk, else a copy; never a symbolic link."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(real, target)


def _place_plans(bundle: Bundle, target: Path) -> None:
    """Records name the library where it lies in the repository."""
    for graph in bundle.manifest.graphs:
        plan = bundle.path / f"{graph.name}.plan"
        record = PlanRecord.read(plan.with_suffix(".plan.json"))
        library = _library(bundle, record)
        if library:
            (target / PLUGINS_FOLDER).mkdir(exist_ok=True)
            for file in (library, library.with_name(MANIFEST)):
                if not (target / PLUGINS_FOLDER / file.name).exists():
                    place(file, target / PLUGINS_FOLDER / file.name)
        place(plan, target / plan.name)
        named = dataclasses.replace(record, plugin_library=f"{PLUGINS_FOLDER}/{LIBRARY}")
        named.write(target / f"{plan.name}.json")


def _library(bundle: Bundle, record: PlanRecord) -> Path | None:
    return None if record.spec.embed_plugins else (bundle.path / record.plugin_library).resolve()


def _place_prepared(bundle: Bundle, target: Path) -> None:
    """What OrtSession makes of graphs at load, made now: the server's Python has no onnx.

    Decode goes through the compiled operators where they take over all of it; bfloat16 is computed in float32.
    """
    from deepseek_trt.engines.sessions.prepared import fused_path, widened_path
    from deepseek_trt.export.passes.widen import widened_bytes
    from deepseek_trt.plugins.cpu.fuse import fused_bytes

    placed = dataclasses.replace(bundle, path=target)
    fused, left = fused_bytes(bundle.graph_path("decode"))
    if not left and _place_compiled(bundle, target):
        fused_path(placed).write_bytes(fused)
    if bundle.manifest.dtype == "bfloat16":
        for graph in bundle.manifest.graphs:
            widened_path(placed, graph.name).write_bytes(widened_bytes(bundle.graph_path(graph.name)))


def _place_compiled(bundle: Bundle, target: Path) -> bool:
    """The compiled CPU operators, as the server's machine may have no compiler; False where there are none."""
    from deepseek_trt.plugins.cpu.library import CPU_LIBRARY_FILE, cpu_library_path

    library = cpu_library_path(bundle.path)
    if library is not None:
        place(library, target / CPU_LIBRARY_FILE)
    return library is not None
