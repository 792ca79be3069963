"""Runs the program as a user does, from a script, and ends it at a chosen moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What the console script holds. Audit events of the files under WORK are counted: at number AT the process gets SIGNAL,
# and the count is written to COUNT at the end.
_SCRIPT = """
import os, signal, sys
work, at, count = os.environ.get("WORK"), int(os.environ.get("AT", "0")), os.environ.get("COUNT")
seen = 0
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.listdir", "import")
def hook(event, args):
    global seen
    if event in EVENTS and (work == "import" if event == "import" else work in str(args[0])):
        seen += 1
        if seen == at:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
if work:
    sys.addaudithook(hook)
try:
    from deepseek_trt.cli.start import main
    main()
finally:
    if count:
        with open(count, "w") as out:
            out.write(str(seen))
"""


class Program:
    """deepseek-trt as a process of its own, started from a script that lies where nothing else does."""

    def __init__(self, folder: Path) -> None:
        self._script, self._count = folder / "deepseek-trt", folder / "count"
        self._script.write_text(_SCRIPT)

    def start(self, *arguments: object, environment: dict[str, str] | None = None, before=(), **options):
        """A process, whose command stands behind the one `before` it."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        command = [*map(os.fspath, before), sys.executable, os.fspath(self._script), *(os.fspath(a) for a in arguments)]
        return subprocess.Popen(command, env={**os.environ, **(environment or {})}, **options)

    def run(self, *arguments: object, **options) -> subprocess.CompletedProcess:
        """Its exit code, stdout and stderr, as text."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=600)
        texts = (data.decode() if data is not None else "" for data in (out, err))
        return subprocess.CompletedProcess(process.args, process.returncode, *texts)

    def events(self, work: Path | str, *arguments: object) -> int:
        """How many moments a run has, as far as `work` is concerned."""
        done = self.run(*arguments, environment={"WORK": str(work), "COUNT": str(self._count)})
        assert done.returncode == 0, done.stderr
        return int(self._count.read_text())

    def run_until(self, at: int, signal: int, work: Path | str, *arguments: object) -> subprocess.CompletedProcess:
        """A run that gets the signal at its moment number `at`; `reached` says how many moments there were."""
        settings = {"WORK": str(work), "AT": str(at), "SIGNAL": str(int(signal)), "COUNT": str(self._count)}
        self._count.unlink(missing_ok=True)
        return self.run(*arguments, environment=settings)

    def reached(self, at: int) -> bool:
        """Whether the last run came to its moment number `at`: no two runs of one command have as many."""
        return not self._count.exists() or int(self._count.read_text()) >= at


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Program:
    return Program(tmp_path_factory.mktemp("program"))


@pytest.fixture
def contents():
    """Every file below a folder by its relative path, with its bytes; links with what they lead to."""

    def read(folder: Path) -> dict[str, bytes]:
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[name] = b"-> " + os.fsencode(path.readlink())
            elif path.is_file():
                found[name] = path.read_bytes()
        return found

    return read
