"""The C++ compiler for both libraries: zig from PyPI, or one of the machine's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.trust.cache import cache_folder, own_or_private
from deepseek_trt.plugins.isolated import plain_environment

_TARGET = "x86_64-linux-gnu.2.17"  # the glibc of the oldest distributions that CUDA 12 and later run on
_ERROR_LINES = 30


@dataclass(frozen=True)
class Compiler:
    """A command that takes g++'s options, its name and version, and the part of the user's cache that it fills."""

    command: tuple[str, ...]
    identity: str
    cache: str = ""

    @property
    def first_run_note(self) -> str:
        """What to add to a message where the first run has yet to compile the C++ standard library."""
        is_cold = self.cache and not (cache_folder() / self.cache).is_dir()
        return " (a minute or two: the first time, its C++ library is compiled too)" if is_cold else ""

    def run(self, arguments: Sequence[str], folder: Path) -> None:
        """Run in `folder`. Raises BuildError with the compiler's own words."""
        environment = plain_environment()
        if self.cache:
            cache = str(own_or_private(self.cache))
            environment |= {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            start_new_session=True,  # Ctrl-C is for this process, which ends the compiler
        )
        if done.returncode:
            words = "\n".join(done.stderr.splitlines()[:_ERROR_LINES])
            raise BuildError(f"{self.identity} failed with exit code {done.returncode}", details=words)


def written_sources(folder: Path) -> dict[str, bytes]:
    """The C++ files in `folder` and below by name, in its order: the compiler gets them in one folder."""
    found = sorted(folder.rglob("*"), key=lambda path: path.name)
    return {path.name: path.read_bytes() for path in found if path.suffix in (".cpp", ".h")}


def find_compiler(cxx: str | None = None) -> Compiler:
    """`cxx` where one is named, else zig. Raises BuildError where it is not there."""
    if cxx is not None:
        return _system_compiler(cxx)
    try:
        found = version("ziglang")
    except PackageNotFoundError:
        raise BuildError("the compiler is missing: run `pip install ziglang`, or name one with --cxx") from None
    command = (str(_zig()), "c++", "-target", _TARGET)
    return Compiler(command, f"zig {found} for {_TARGET}", f"zig-{found}")


def _zig() -> Path:
    """The program in PyPI's package, run without Python: a module of its name may lie anywhere on sys.path."""
    program = Path(str(distribution("ziglang").locate_file("ziglang"))) / "zig"
    if not os.access(program, os.X_OK):
        raise BuildError("ziglang is installed without its zig: pip install --force-reinstall ziglang")
    return program


def _system_compiler(cxx: str) -> Compiler:
    found = shutil.which(cxx)
    path = found and os.path.abspath(found)  # it is run in another folder
    if path is None:
        raise BuildError(f"there is no compiler {cxx!r}: give --cxx a command on PATH, or leave it out to use zig")
    done = subprocess.run(
        [path, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=plain_environment(),
    )
    if done.returncode or not done.stdout.strip():
        raise BuildError(f"{path} --version failed: give --cxx a C++ compiler that takes g++'s options")
    return Compiler((path,), done.stdout.splitlines()[0])
