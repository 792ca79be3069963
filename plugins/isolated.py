"""Other programs, run so that nothing but what this package names gets into them: no folder, and no variable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What makes Python, a compiler or its linker read more than its command names.
_LEFT_OUT = (
    "CCC_OVERRIDE_OPTIONS",
    "COMPILER_PATH",
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "C_INCLUDE_PATH",
    "DEPENDENCIES_OUTPUT",
    "GCC_EXEC_PREFIX",
    "LIBRARY_PATH",
    "SUNPRO_DEPENDENCIES",
)
_LEFT_OUT_PREFIXES = ("PYTHON", "ZIG_")
_START = "import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main({argument})"


def plain_environment() -> dict[str, str]:
    """The environment of this process without the variables that bring code or options into Python and compilers."""
    return {k: v for k, v in os.environ.items() if k not in _LEFT_OUT and not k.startswith(_LEFT_OUT_PREFIXES)}


def start_python(module: str, environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """Python that runs `main` of a module of this package, with pipes, in the working folder `folder`.

    It imports from where this process does, but never from the current folder. Ctrl-C does not reach it: end it.
    """
    return subprocess.Popen(
        python_command(module),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )


def python_command(module: str, argument: int | None = None) -> list[str]:
    """What runs `main` of a module of this package, which may get one number, as `start_python` does."""
    start = _START.format(module=module, argument="" if argument is None else argument)
    return [sys.executable, "-I", "-c", start, *import_folders()]


def import_folders() -> list[str]:
    """sys.path without the current folder, unless this package itself lies there: then it comes last."""
    here = Path.cwd()
    own = Path(__file__).absolute().parents[2]
    others = [path for path in sys.path if os.path.isabs(path) and not _is_same(path, here)]
    return others if str(own) in others else [*others, str(own)]


def _is_same(path: str, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
