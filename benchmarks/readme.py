"""Run README's commands as printed, and name every line, table and figure that is stale.

    python benchmarks/readme.py [WORKDIR]                      # on the model that ships, under DeepSeek-V2-Lite's name
    python benchmarks/readme.py [WORKDIR] --model v2-lite      # on V2-Lite's shapes: 40 GB of disk, half an hour
    python benchmarks/readme.py --figures                      # of README and docs alone: runs nothing
    python benchmarks/readme.py WORKDIR --remake [docs/scale.md ...]   # hours, all: nothing else may run

Servers are not started. What a run on another processor prints differs in last digits; times are not compared. Figures
stand in sections that a command makes (section.py) and that say of which commit they are; README's tables are taken
from docs'. Exits with 1 where a command fails, or something is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from make_checkpoint import PUBLISHED, fill_random, reduced, write_sparse
from readme_tables import TABLES
from section import ROOT, make, sections

NAME = "DeepSeek-V2-Lite"
DEMO = ROOT / "cli" / "demo_model"
# The layers of V2-Lite's shapes that are there; layer 4 is a hole in its file, and reads as zeros.
LAYERS, FILLED = 6, (0, 1, 2, 3, 5)
_LEFT_OUT = re.compile(r"\[?\.\.\.\]?")  # what README cuts out of a line
_TIMES = re.compile(r"tokens/s|─{10}")  # and what is not compared
_SKIPPED = ("serve.sh", "deepseek-trt serve", "./sentiment")  # servers, and a checkpoint that does not ship


@dataclass(frozen=True)
class Command:
    """A command of README, and the lines that README shows under it."""

    line: str
    shown: tuple[str, ...] = ()

    def stale_lines(self, output: str) -> Iterator[str]:
        """Lines that README shows and the output does not hold."""
        found = " ".join(output.split())
        for line in self.shown:
            pieces = [" ".join(piece.split()) for piece in _LEFT_OUT.split(line)]
            if not _TIMES.search(line) and not all(piece in found for piece in pieces):
                yield line


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
        yield Command(line.replace(".../demo_model", f"./{NAME}"), tuple(shown))


def for_shapes(command: Command) -> Command | None:
    """For V2-Lite's shapes: holes are allowed, and what README says of models larger than memory is done."""
    if command.shown:
        return None  # the transcript is the shipped model's
    words = shlex.split(command.line)
    if words[1] == "export":
        words.append("--allow-zeros")
    elif words[1] == "validate":
        words += ["--layers", f"0-{FILLED[-2]},{FILLED[-1]}"]
    return Command(shlex.join(words))


def put_checkpoint(model: str, work: Path) -> None:
    checkpoint = work / NAME
    if checkpoint.exists():
        return
    if model == "demo":
        checkpoint.symlink_to(DEMO)
        return
    write_sparse(reduced(PUBLISHED[model], LAYERS), checkpoint)
    fill_random(checkpoint, FILLED)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((DEMO / name).read_bytes())


def run(command: Command, work: Path) -> list[str]:
    """What is wrong: the command failed, or lines are stale."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120"}
    ran = subprocess.run(shlex.split(command.line), cwd=work, env=environment, capture_output=True, text=True)
    if ran.returncode:
        return [f"failed with exit code {ran.returncode}: {' '.join(ran.stderr.strip().splitlines()[-1:])}"]
    return [f"stale: {line.strip()}" for line in command.stale_lines(ran.stdout + ran.stderr)]


def run_commands(model: str, work: Path) -> int:
    """How many things are wrong; each is printed."""
    put_checkpoint(model, work)
    wrong = 0
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        chosen = command if model == "demo" else for_shapes(command)
        if chosen is None:
            continue
        print(f"$ {chosen.line}", flush=True)
        found = run(chosen, work)
        wrong += len(found)
        print("".join(f"  {line}\n" for line in found), end="", flush=True)
    return wrong


def stale_figures() -> list[str]:
    """Sections of another commit, and tables of README that are not what docs' sections say."""
    found = [f"{section.name} {why}" for section in sections() if (why := section.staleness())]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found += [f"README.md: the table is not that of {table.file}" for table in TABLES if table.text() not in readme]
    return found


def remake(names: list[str], work: Path) -> None:
    for section in list(sections()):
        if not names or any(name in section.name for name in names):
            print(f"making {section.name}", file=sys.stderr, flush=True)
            make(section, work)
    readme = ROOT / "README.md"
    for table in TABLES:
        readme.write_text(table.put(readme.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, nargs="?", metavar="WORKDIR")
    parser.add_argument("--model", choices=("demo", "v2-lite"), default="demo")
    parser.add_argument("--figures", action="store_true", help="run no command")
    parser.add_argument("--remake", nargs="*", metavar="SECTION", help="sections whose file or command holds one; all")
    given = parser.parse_args()
    work = (given.workdir or Path(tempfile.mkdtemp(prefix="readme-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.remake is not None:
        remake(given.remake, work)
        return
    wrong = 0 if given.figures else run_commands(given.model, work)
    figures = stale_figures()
    print("".join(f"stale: {line}\n" for line in figures), end="")
    wrong += len(figures)
    print(f"{wrong} stale or failed" if wrong else "README is right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
