"""TensorRT-RTX's parser opens "libtensorrt_rtx.so" when it adds a plugin, but its wheel ships "libtensorrt_rtx.so.1".

Without that name the process dies ("terminate called without an active exception"). So an empty library of that name,
which needs the real one, is made once and loaded before the first parse.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

from deepseek_trt.export.trust.cache import kept_file
from deepseek_trt.plugins.cxx import Compiler, find_compiler

_NAME = "libtensorrt_rtx.so"
_REAL = "libtensorrt_rtx.so.1"
_FLAGS = ("-shared", "-fPIC", "-Os", "-s", "-nostdlib", "-Wl,--build-id=none")


def prepare(trt_module: ModuleType) -> None:
    """Make libtensorrt_rtx.so loadable by that name if `trt_module` is TensorRT-RTX; else, or done before, nothing.

    Raises BuildError where the compiler is missing or fails.
    """
    if not hasattr(trt_module, "ComputeCapability"):
        return
    if not _is_loadable():
        ctypes.CDLL(str(_shim(find_compiler())), mode=ctypes.RTLD_GLOBAL)


def _is_loadable() -> bool:
    """Whether the name resolves already: a real one is installed, or the shim is loaded."""
    try:
        ctypes.CDLL(_NAME)
    except OSError:
        return False
    return True


def _shim(compiler: Compiler) -> Path:
    """The shim in the cache, made if need be."""
    key = hashlib.sha256("\0".join((compiler.identity, *_FLAGS)).encode()).hexdigest()[:16]

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".shim-", dir=target.parent) as folder:
            os.replace(_build(Path(folder), compiler), target)

    return kept_file(f"rtx-shim-{key}", _NAME, make)


def _build(folder: Path, compiler: Compiler) -> Path:
    """Linked against a stand-in of the real library's name: the loader finds the real one, as it is loaded already."""
    (folder / "empty.cpp").write_text("int deepseek_trt_rtx_shim;\n", encoding="utf-8")
    compiler.run([*_FLAGS, f"-Wl,-soname,{_REAL}", "empty.cpp", "-o", _REAL], folder)
    linked = ("-Wl,--no-as-needed", f"-Wl,-soname,{_NAME}")
    compiler.run([*_FLAGS, *linked, "empty.cpp", _REAL, "-o", _NAME], folder)
    return folder / _NAME
