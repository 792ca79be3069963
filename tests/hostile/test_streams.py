"""Standard streams that are closed, full or read by nobody: one sentence, and no exit code 0 where output was lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

FULL = "cannot write to standard output: No space left on device"
CLOSED = "cannot write to standard output: Bad file descriptor"


@pytest.fixture(scope="module")
def made(program, demo_checkpoint, bundle_of, tmp_path_factory) -> dict[str, list[object]]:
    """Commands that are done at once, as all is there already; by name."""
    work = tmp_path_factory.mktemp("made")
    bundle = Path(shutil.copytree(bundle_of(demo_checkpoint).path, work / "bundle"))
    return {
        "check": ["check", demo_checkpoint],
        "env": ["env"],
        "env as JSON": ["env", "--json"],
        "help": ["--help"],
        "help of a command": ["export", "--help"],
        "version": ["--version"],
        "generate": ["generate", bundle, "--prompt", "x", "--max-new-tokens", "2"],
        "generate as JSON": ["generate", bundle, "--prompt", "x", "--max-new-tokens", "2", "--json"],
        "two prompts": ["generate", bundle, "--prompt", "x", "--prompt", "y", "--max-new-tokens", "2"],
        "bench": ["bench", bundle, "--context", "8", "--new-tokens", "3"],
        "export": ["export", demo_checkpoint, work / "new"],
        "model-repository": ["model-repository", bundle, work / "repository", "--backend", "ort"],
        "validate": ["validate", bundle, "--backend", "ort", "--no-independent", "--report", work / "report"],
        "an error": ["check", work / "none"],
        "an error as JSON": ["check", work / "none", "--json"],
        "usage": ["check"],
    }


QUICK = ("check", "env as JSON", "help", "usage", "an error as JSON")
SLOW = ("env", "version", "help of a command", "generate", "generate as JSON", "two prompts", "bench", "export")
SLOW += ("model-repository", "validate", "an error")
commands = pytest.mark.parametrize("command", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
SILENT = ("an error", "usage")  # on stdout


@commands
def test_a_full_standard_output(program, made, command):
    with open("/dev/full", "wb") as full:
        done = program.run(*made[command], stdout=full)
    check(command, done, FULL)


@commands
def test_a_closed_standard_output(program, made, command):
    """The file that is opened next must not get what is printed: it would have the number of standard output."""
    done = program.run(*made[command], stdout=None, preexec_fn=lambda: os.close(1))
    check(command, done, CLOSED)


def check(command: str, done: subprocess.CompletedProcess, words: str) -> None:
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if command.startswith("an error"):
        assert (done.returncode, done.stderr.count("error:")) == (1, 1)
    elif command == "usage":
        assert done.returncode == 2
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert words in done.stderr or "help" in command or command == "version"


@commands
def test_a_pipe_that_nobody_reads(program, made, command):
    read, write = os.pipe()
    os.close(read)
    done = program.run(*made[command], stdout=write)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "roken pipe" not in done.stderr
    assert done.returncode == {"an error": 1, "an error as JSON": 1, "usage": 2}.get(command, done.returncode)
    assert done.returncode in (1, 2, 128 + signal.SIGPIPE)


@commands
@pytest.mark.parametrize("how", ["full", "closed"])
def test_standard_error_that_takes_nothing(program, made, command, how):
    """What it would have got is lost, and nothing else: the answer and the exit code are as ever."""
    usual = program.run(*made[command])
    if how == "full":
        with open("/dev/full", "wb") as full:
            done = program.run(*made[command], stderr=full)
    else:
        done = program.run(*made[command], stderr=None, preexec_fn=lambda: os.close(2))
    assert done.returncode == usual.returncode
    if command in ("check", "env", "help", "version", "generate"):
        assert done.stdout == usual.stdout


@pytest.mark.slow
def test_all_streams_closed(program, demo_checkpoint, tmp_path, contents, bundle_of):
    """Weights and graphs are what they are with all of them open."""

    def close() -> None:
        for number in (0, 1, 2):
            os.close(number)

    done = program.run(
        "export", demo_checkpoint, tmp_path / "out", stdin=None, stdout=None, stderr=None, preexec_fn=close
    )
    assert done.returncode == 1  # its last line was lost
    program.run("export", demo_checkpoint, tmp_path / "usual")
    assert contents(tmp_path / "out") == contents(tmp_path / "usual")
