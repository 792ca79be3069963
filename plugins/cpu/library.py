"""The library of compiled CPU operators: built once a machine, or found beside the bundle that it serves."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deepseek_trt.export.errors import BackendError, BuildError
from deepseek_trt.export.writing.working import working_folder
from deepseek_trt.plugins.cpu.operators import OPERATORS, Operator, generated_headers
from deepseek_trt.plugins.cxx import Compiler, cache_folder, find_compiler, written_sources

CPU_LIBRARY_FILE = "cpu_ops.so"  # its name where it lies in a bundle
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


def cpu_library(bundle: Path | None = None) -> CpuLibrary:
    """The library beside the bundle, in the user's cache, or built now (once, in a minute).

    Raises BackendError where it could be built but the compiler fails.
    """
    if bundle is not None and (bundle / CPU_LIBRARY_FILE).is_file():
        return CpuLibrary(bundle / CPU_LIBRARY_FILE)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return CpuLibrary(None, "the compiled CPU operators are for Linux on x86-64")
    sources = source_files()
    if not sources:
        return CpuLibrary(None, "the sources of the compiled CPU operators are missing: install deepseek-trt again")
    try:
        compiler = find_compiler()
    except BuildError as error:
        return CpuLibrary(None, f"no compiled CPU operators ({error})")
    path = cache_folder() / "cpu" / f"{_digest(sources, compiler)}.so"
    if not path.is_file():
        _build(sources, compiler, path)
    return CpuLibrary(path)


def cpu_library_path(bundle: Path | None = None) -> Path | None:
    """The library's file, to be copied to where a bundle is served from; None where there can be none."""
    return cpu_library(bundle).path


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
    """Compile in a folder of its own and rename, so that processes may build at the same time."""
    with working_folder(path, wait=True) as folder:
        if path.is_file():  # another process has built it meanwhile
            return
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
