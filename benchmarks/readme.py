"""Run README's commands as printed, and name every line of their output that README states and that is no longer so.

    python benchmarks/readme.py [WORKDIR]

The commands for ./DeepSeek-V2-Lite run on the model that ships with the package, under that name; servers are not
started. What a run of another processor prints differs in last digits; times are not compared. Exits with 1 where a
command fails, or a line is stale.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "cli" / "demo_model"
_LEFT_OUT = re.compile(r"\[?\.\.\.\]?")  # what README cuts out of a line
_TIMES = re.compile(r"tokens/s|─{10}")  # and what is not compared
_SKIPPED = ("serve.sh", "./sentiment")  # a server, and a checkpoint that does not ship


@dataclass(frozen=True)
class Command:
    """A command of README, and the lines that README shows under it."""

    line: str
    shown: tuple[str, ...] = ()


def commands(text: str) -> Iterator[Command]:
    """Those of the list "From a checkpoint to a server", then those of the transcript."""
    block = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    for line in block:
        command = line.partition("  #")[0].split(" && ")[0].rstrip()
        if command.startswith("deepseek-trt ") and not any(word in command for word in _SKIPPED):
            yield Command(command)
    transcript = re.search(r"^    \$ .*?(?=^\S)", text, re.DOTALL | re.MULTILINE)
    assert transcript, "README shows no run"
    for part in re.split(r"^\$ ", re.sub(r"^    ", "", transcript[0], flags=re.MULTILINE), flags=re.MULTILINE)[1:]:
        line, *shown = part.rstrip().splitlines()
        yield Command(line.replace(".../demo_model", "./DeepSeek-V2-Lite"), tuple(shown))


def stale_lines(command: Command, output: str) -> Iterator[str]:
    """Lines that README shows and the output does not hold."""
    found = " ".join(output.split())
    for line in command.shown:
        pieces = [" ".join(piece.split()) for piece in _LEFT_OUT.split(line)]
        if not _TIMES.search(line) and not all(piece in found for piece in pieces):
            yield line


def main() -> None:
    work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="readme-"))
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "DeepSeek-V2-Lite").exists():
        (work / "DeepSeek-V2-Lite").symlink_to(DEMO)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    wrong = 0
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        print(f"$ {command.line}", flush=True)
        run = subprocess.run(shlex.split(command.line), cwd=work, env=environment, capture_output=True, text=True)
        if run.returncode:
            print(f"  failed with exit code {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
        stale = list(stale_lines(command, run.stdout + run.stderr)) if run.returncode == 0 else []
        for line in stale:
            print(f"  stale: {line.strip()}")
        wrong += bool(run.returncode) + len(stale)
    print(f"{wrong} stale or failed" if wrong else "README is right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
