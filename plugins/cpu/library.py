"""The library of compiled CPU operators: built once a machine, or found beside the bundle that it serves."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.export.trust.cache import kept_file
from deepseek_trt.export.trust.libraries import library_in_memory
from deepseek_trt.plugins.cpu.operators import OPERATORS, Operator, generated_headers
from deepseek_trt.plugins.cxx import Compiler, find_compiler, written_sources

CPU_LIBRARY_FILE = "cpu_ops.so"  # its name where it lies in a bundle
_AGAIN = "write the repository again with deepseek-trt model-repository"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-DNDEBUG", "-g0")
# Object, source and what else its compilation needs. The baseline comes first: of inline functions of the C++ library
# that several objects hold, the linker takes the first, which must run everywhere; and v3 comes before v4.
_OBJECTS = (
    ("ops.o", "ops.cpp", ()),
    ("team.o", "team.cpp", ()),
    ("sampling.o", "sampling_entry.cpp", ()),
    ("v3.o", "kernels.cpp", ("-mcpu=x86_64_v3", "-DISA=v3")),
    ("sampling_v3.o", "sampling.cpp", ("-mcpu=x86_64_v3", "-DISA=v3")),
    ("v4.o", "kernels.cpp", ("-mcpu=x86_64_v4", "-DISA=v4")),
    ("sampling_v4.o", "sampling.cpp", ("-mcpu=x86_64_v4", "-DISA=v4")),
)


class ExpertsHit(NamedTuple):
    """Counts over decode steps: layers with experts, and experts read in them, each once however many rows chose it."""

    layers: int
    experts: int


@dataclass(frozen=True)
class CpuLibrary:
    """The library, or why there is none."""

    path: Path | None
    reason: str = ""


def cpu_library(bundle: Bundle | None = None) -> CpuLibrary:
    """The library that the bundle lists, or that of the user's cache, or one built now (once, in a minute).

    Raises BackendError where it could be built but the compiler fails, BundleError where the bundle's was changed.
    """
    if bundle is not None and CPU_LIBRARY_FILE in bundle.files:
        return CpuLibrary(library_in_memory(bundle.files.read(CPU_LIBRARY_FILE, _AGAIN), CPU_LIBRARY_FILE))
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return CpuLibrary(None, "the compiled CPU operators are for Linux on x86-64")
    sources = source_files()
    if not sources:
        return CpuLibrary(None, "the sources of the compiled CPU operators are missing: install deepseek-trt again")
    try:
        compiler = find_compiler()
    except BuildError as error:
        return CpuLibrary(None, f"no compiled CPU operators ({error})")
    name = f"{_digest(sources, compiler)}.so"
    return CpuLibrary(kept_file("cpu", name, lambda path: _build(sources, compiler, path)))


def cpu_library_bytes(bundle: Bundle | None = None) -> bytes | None:
    """The library, to be put where a bundle is served from; None where there can be none."""
    path = cpu_library(bundle).path
    return path.read_bytes() if path else None


def experts_hit_counter(library: Path) -> Callable[[], ExpertsHit] | None:
    """A function that gives what the operators of all sessions counted so far; None where the library has none."""
    read = getattr(ctypes.CDLL(str(library)), "deepseek_trt_cpu_experts_hit", None)
    if read is None:
        return None

    def count() -> ExpertsHit:
        layers, experts = ctypes.c_int64(), ctypes.c_int64()
        read(ctypes.byref(layers), ctypes.byref(experts))
        return ExpertsHit(layers.value, experts.value)

    return count


def source_files(operators: Sequence[Operator] = OPERATORS) -> dict[str, bytes]:
    """Contents by file name, as the compiler gets them in one folder; none where csrc is not installed."""
    written = written_sources(Path(__file__).parent / "csrc")
    return written and written | generated_headers(operators)


def _digest(sources: dict[str, bytes], compiler: Compiler) -> str:
    digest = hashlib.sha256(repr((compiler.identity, _FLAGS, _OBJECTS)).encode())
    for name, data in sources.items():
        digest.update(name.encode() + data)
    return digest.hexdigest()[:32]


def _build(sources: dict[str, bytes], compiler: Compiler, path: Path) -> None:
    """Compile in a folder of its own, so that processes may build at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        for file, data in sources.items():
            (folder / file).write_bytes(data)
        try:
            for target, source, flags in _OBJECTS:
                compiler.run([*_FLAGS, *flags, "-c", source, "-o", target], folder)
            compiler.run(["-shared", "-s", *(o[0] for o in _OBJECTS), "-o", CPU_LIBRARY_FILE, "-lpthread"], folder)
        except BuildError as error:
            mend = "run `pip install --force-reinstall ziglang`, or pass library=None to use the exported bodies"
            sentence = f"the CPU operators do not compile ({error.sentence}): {mend}"
            raise BackendError(sentence, details=error.details) from None
        os.replace(folder / CPU_LIBRARY_FILE, path)
