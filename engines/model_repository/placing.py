"""The bundle's files in a repository: real ones, and those alone that the bundle's manifest names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deepseek_trt.engines.model_repository.copying import copy_file, real_file
from deepseek_trt.engines.plans.plan import PlanRecord, plan_files
from deepseek_trt.engines.sessions.prepared import fused_name
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.manifest import list_added, write_manifest
from deepseek_trt.export.errors import BundleError
from deepseek_trt.plugins.cpu.library import CPU_LIBRARY_FILE, cpu_library_bytes
from deepseek_trt.plugins.tensorrt.manifest import MANIFEST, PLUGINS_FOLDER

_AGAIN = "build the plans again, or give --backend ort"


def carried_files(bundle: Bundle, backend: str) -> dict[str, str]:
    """The sha256 of every file but manifest and weights that a repository for `backend` takes from the bundle, by name:
    what export wrote and, for TensorRT, plans with their plugin library. BundleError where one is not listed.
    """
    names = sorted(bundle.manifest.files)
    for graph in bundle.manifest.graphs if backend == "tensorrt" else ():
        built = PlanRecord.of(bundle, graph.name)
        names += plan_files(graph.name)
        if not built.spec.embed_plugins:
            names += [built.plugin_library, f"{PLUGINS_FOLDER}/{MANIFEST}"]
    missing = next((name for name in names if name not in bundle.files), None)
    if missing:
        raise BundleError(f"{bundle.path} lists no {missing}: {_AGAIN}")
    return {name: bundle.files.sha256[name] for name in names}


def place_bundle(bundle: Bundle, backend: str, target: Path, link: bool = False) -> None:
    """Make the folder `target`, and in it all that a session of `backend` reads: copies, or hard links.

    Its manifest lists what is there. BundleError where a file is not the one that the bundle lists.
    """
    bundle.prove_weights()
    carried = carried_files(bundle, backend)
    for name in (*carried, WEIGHTS_FILE):
        placed = target / name
        placed.parent.mkdir(parents=True, exist_ok=True)
        copy_file(real_file(bundle.path / name, bundle.path), placed, link)
    made = _place_compiled(bundle, target) if backend == "tensorrt" else _place_prepared(bundle, target)
    write_manifest(target, dataclasses.replace(bundle.manifest, added={}))
    list_added(target, (*(carried.keys() - bundle.manifest.files.keys()), *made))
    copied = Bundle.open(target).files.sha256  # which compares what export wrote
    for name, digest in carried.items():
        if copied[name] != digest:
            raise BundleError(f"{bundle.path / name} is not the file that its manifest lists: {_AGAIN}")


def _place_prepared(bundle: Bundle, target: Path) -> tuple[str, ...]:
    """Place the graphs for the compiled operators, where those take over all: the server's Python has no onnx.

    Gives the names of what was placed.
    """
    from deepseek_trt.plugins.cpu.fuse import fused_bytes

    names = {graph.name for graph in bundle.manifest.graphs}
    if not {"prefill", "decode"} <= names:
        return ()
    fused = {fused_name(name): fused_bytes(bundle.traced_bytes(name)) for name in names}
    made = () if any(left for _, left in fused.values()) else _place_compiled(bundle, target)
    if not made:
        return ()
    for name, (data, _) in fused.items():
        (target / name).write_bytes(data)
    return (*made, *fused)


def _place_compiled(bundle: Bundle, target: Path) -> tuple[str, ...]:
    """Place the compiled CPU operators, as the server's machine may have no compiler; nothing where there are none."""
    library = cpu_library_bytes(bundle)
    if library is None:
        return ()
    (target / CPU_LIBRARY_FILE).write_bytes(library)
    return (CPU_LIBRARY_FILE,)
