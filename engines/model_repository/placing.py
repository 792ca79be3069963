"""The bundle's files in a repository: real ones, hard-linked where the disk allows it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from deepseek_trt.engines.plan import PlanRecord
from deepseek_trt.export.bundle import Bundle
from deepseek_trt.plugins.manifest import LIBRARY, MANIFEST, PLUGINS_FOLDER

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
    elif bundle.manifest.dtype == "bfloat16":
        _place_widened(bundle, target)


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


def _place_widened(bundle: Bundle, target: Path) -> None:
    """ONNX Runtime's CPU provider computes in float32, and the server's Python has no onnx to change the graphs."""
    from deepseek_trt.engines.ort import widened_path
    from deepseek_trt.engines.widen import widened_bytes

    placed = dataclasses.replace(bundle, path=target)
    for graph in bundle.manifest.graphs:
        widened_path(placed, graph.name).write_bytes(widened_bytes(bundle.graph_path(graph.name)))
