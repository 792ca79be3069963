"""Hands a plugin library to TensorRT's registry."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.export.trust.libraries import library_in_memory
from deepseek_trt.export.trust.listing import Listing
from deepseek_trt.plugins.tensorrt import rtx_shim
from deepseek_trt.plugins.tensorrt.manifest import MANIFEST, Manifest, read_manifest

# By the TensorRT module's name, as each has one registry a process: the sha256 and handle of the library it holds.
_held: dict[str, tuple[str, Any]] = {}


def load_library(path: Path, trt_module: ModuleType, sha256: str | None = None) -> Manifest:
    """Make the plugins in `path` those of `trt_module` (tensorrt or tensorrt_rtx), and give the library's manifest.

    Once a process does; more calls do nothing. A registry knows one plugin a name, so another library takes the place
    of the one before, whose engines go on with it: call this before parsing or deserialising for that library's model.
    Raises BuildError where the file is not what its manifest says, or is not the one of that `sha256`, and BackendError
    where TensorRT refuses it.
    """
    manifest = read_manifest(path)
    if sha256 not in (None, manifest.sha256):
        raise BuildError(f"{path} changed while it was opened: run `deepseek-trt plugins` again")
    name = trt_module.__name__
    if name in _held and _held[name][0] == manifest.sha256:
        return manifest
    rtx_shim.prepare(trt_module)
    registry = trt_module.get_plugin_registry()
    if name in _held:
        _, held = _held.pop(name)
        registry.deregister_library(held)
    memory = str(loaded_from(path, manifest))
    ctypes.CDLL(memory)  # never unloaded: engines may still run its code after it is deregistered
    handle = registry.load_library(memory)
    if handle is None:
        raise BackendError(f"{name} does not take {path} (its log says why): is another one loaded?")
    _held[name] = manifest.sha256, handle
    return manifest


def loaded_from(path: Path, manifest: Manifest) -> Path:
    """Where this process has the library in memory, as its manifest describes it."""
    listing = Listing(path.parent, {path.name: manifest.sha256}, MANIFEST, BuildError)
    return library_in_memory(listing.read(path.name, "run `deepseek-trt plugins` again"), path.name)
