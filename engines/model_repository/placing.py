"""The bundle's files in a repository: real ones, and those alone that the bundle's manifest names."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from deepseek_trt.engines.model_repository.copying import copy_file
from deepseek_trt.engines.plans.plan import PlanRecord, plan_path
from deepseek_trt.export.bundle.folder import MANIFEST_FILE, WEIGHTS_FILE, Bundle
from deepseek_trt.export.errors import BundleError
from deepseek_trt.export.text.files import text_files
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, MANIFEST, PLUGINS_FOLDER

_RECORD = ".plan.json"


def carried_files(bundle: Bundle, backend: str) -> dict[str, Path]:
    """Every file that a repository for `backend` takes from the bundle, by its path there: what the manifest lists, and
    text files that came later. BundleError where one is missing.

    Plans bring the plugin library that they want beside them, and the library's manifest.
    """
    names = sorted({MANIFEST_FILE, WEIGHTS_FILE, *bundle.manifest.files})
    carried = {name: _listed(bundle, name) for name in names}
    carried |= {file.relative_to(bundle.path).as_posix(): file for file in text_files(bundle.path)}
    for graph in bundle.manifest.graphs if backend == "tensorrt" else ():
        plan = plan_path(bundle, graph.name)
        record = plan.with_suffix(_RECORD)
        carried |= {plan.name: plan, record.name: record}
        built = PlanRecord.read(record)
        if not built.spec.embed_plugins:
            library = (bundle.path / built.plugin_library).resolve()
            carried |= {f"{PLUGINS_FOLDER}/{f.name}": f for f in (library, library.with_name(MANIFEST))}
    return carried


def _listed(bundle: Bundle, name: str) -> Path:
    """The file of that name in the bundle."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not (bundle.path / path).is_file():
        raise BundleError(f"{bundle.path} has no file {name!r}, which its manifest lists: export the checkpoint again")
    return bundle.path / path


def place_bundle(bundle: Bundle, backend: str, target: Path, link: bool = False) -> None:
    """Make the folder `target`, and in it all that a session of `backend` reads: copies, or hard links."""
    for name, file in carried_files(bundle, backend).items():
        placed = target / name
        placed.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(_RECORD):  # names the library where it lies in the repository
            record = PlanRecord.read(file)
            dataclasses.replace(record, plugin_library=f"{PLUGINS_FOLDER}/{LIBRARY}").write(placed)
        else:
            copy_file(file, placed, link)
    if backend == "tensorrt":
        _place_compiled(bundle, target)  # they sample
    else:
        _place_prepared(bundle, target)


def _place_prepared(bundle: Bundle, target: Path) -> None:
    """Place the graphs for the compiled operators, where those take over all: the server's Python has no onnx."""
    from deepseek_trt.engines.sessions.prepared import fused_path
    from deepseek_trt.plugins.cpu.fuse import fused_bytes

    placed, names = dataclasses.replace(bundle, path=target), {graph.name for graph in bundle.manifest.graphs}
    if not {"prefill", "decode"} <= names:
        return
    fused = {name: fused_bytes(bundle.traced_path(name)) for name in ("prefill", "decode")}
    if not any(left for _, left in fused.values()) and _place_compiled(bundle, target):
        for name, (data, _) in fused.items():
            fused_path(placed, name).write_bytes(data)


def _place_compiled(bundle: Bundle, target: Path) -> bool:
    """Place the compiled CPU operators, as the server's machine may have no compiler; False where there are none."""
    from deepseek_trt.plugins.cpu.library import CPU_LIBRARY_FILE, cpu_library_path

    library = cpu_library_path(bundle.path)
    if library is not None:
        copy_file(library, target / CPU_LIBRARY_FILE)
    return library is not None
