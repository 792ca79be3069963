"""Hands a plugin library to TensorRT's registry."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.tensorrt import rtx_shim
from deepseek_trt.plugins.tensorrt.manifest import Manifest, read_manifest

# By the TensorRT module's name, as each has one registry a process: the sha256 and handle of the library it holds.
_held: dict[str, tuple[str, Any]] = {}
_opened: dict[Path, str] = {}  # sha256 of each file opened: the dynamic loader never opens a path a second time


def load_library(path: Path, trt_module: ModuleType) -> Manifest:
    """Make the plugins in `path` those of `trt_module` (tensorrt or tensorrt_rtx), and give the library's manifest.

    Once a process does; more calls do nothing. A registry knows one plugin a name, so another library takes the place
    of the one before, whose engines go on with it: call this before parsing or deserialising for that library's model.
    Raises BuildError where the file is not what its manifest says, and BackendError where TensorRT refuses it.
    """
    manifest = read_manifest(path)
    name = trt_module.__name__
    if name in _held and _held[name][0] == manifest.sha256:
        return manifest
    path = path.resolve()
    if _opened.setdefault(path, manifest.sha256) != manifest.sha256:
        raise BackendError(f"{path} was built anew after this process loaded it: start a new process")
    rtx_shim.prepare(trt_module)
    registry = trt_module.get_plugin_registry()
    if name in _held:
        _, held = _held.pop(name)
        registry.deregister_library(held)
    ctypes.CDLL(str(path))  # never unloaded: engines may still run its code after it is deregistered
    handle = registry.load_library(str(path))
    if handle is None:
        raise BackendError(f"{name} does not take {path} (its log says why): is another one loaded?")
    _held[name] = manifest.sha256, handle
    return manifest
