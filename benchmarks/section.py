"""Sections of docs and README that commands make: where they lie, how they are made again, whether they are stale.

A section lies between `<!-- python benchmarks/NAME.py ARGUMENTS -->` and `<!-- end -->`. What the command prints stands
there, and at its end the commit that it was made of.
"""

from __future__ import annotations

import ast
import datetime
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PACKAGE = ("api", "cli", "engines", "export", "plugins", "validate")
SOURCES = (*PACKAGE, "benchmarks", "examples")
# What runs on a GPU, or makes what does; figures of a processor do not follow from it.
_OF_GPUS = (
    "plugins/aot",
    "plugins/fused",
    "plugins/kernels",
    "plugins/tensorrt",
    "engines/plans",
    "engines/sessions/tensorrt",
)
# What serves: figures of these scripts alone follow from it.
_OF_SERVERS = ("engines/model_repository", "engines/serving")
_SERVERS = {"hashing", "server", "soak"}
_OF_PROCESSORS = {
    "accuracy",
    "chunk_cost",
    "cpu",
    "cpu_speculation",
    "hashing",
    "load",
    "moe_forms",
    "prefill_peak",
    "sampling",
    "server",
    "sizes",
    "soak",
    "v2_lite",
    "validate",
}
_SECTION = re.compile(r"^<!-- python (benchmarks/\S+\.py[^\n]*?) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
_MADE = re.compile(r"^Made of commit ([0-9a-f]{7,40}), \d{4}-\d\d-\d\d\.$", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """command: the script and its arguments, relative to the checkout; text: what stands between the markers."""

    file: Path
    command: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.relative_to(ROOT)}: {self.command}"

    @property
    def commit(self) -> str | None:
        """What it was made of; None where it does not say."""
        found = _MADE.search(self.text)
        return found[1] if found else None

    @property
    def sources(self) -> tuple[str, ...]:
        """What its figures follow from, as git names paths."""
        script = Path(shlex.split(self.command)[0])
        left_out = (
            *(_OF_GPUS if script.stem in _OF_PROCESSORS else ()),
            *(() if script.stem in _SERVERS else _OF_SERVERS),
        )
        own = sorted(str(file.relative_to(ROOT)) for file in scripts_of(ROOT / script))
        return (*PACKAGE, *(f":(exclude){name}" for name in left_out), *own)

    def staleness(self) -> str:
        """Why its figures are not this commit's; nothing where they are."""
        if self.commit is None:
            return "says no commit"
        try:
            changed = _git("diff", "--name-only", self.commit, "--", *self.sources).splitlines()
        except subprocess.CalledProcessError:
            return f"made of commit {self.commit}, which this repository does not have"
        return f"made of commit {self.commit}: {len(changed)} source files changed since" if changed else ""


def scripts_of(script: Path) -> set[Path]:
    """The script, those whose names begin with its own, which it runs, and the modules beside it that they import."""
    found: set[Path] = set()
    left = [script, *BENCHMARKS.glob(f"{script.stem}_*.py"), *(BENCHMARKS / script.stem).glob("*.py")]
    while left:
        file = left.pop()
        if file not in found and file.is_file():
            found.add(file)
            left += [BENCHMARKS / f"{name.replace('.', '/')}.py" for name in _imported(file)]
    return found


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def sections(root: Path = ROOT) -> Iterator[Section]:
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for found in _SECTION.finditer(file.read_text(encoding="utf-8")):
            yield Section(file, found[1], found[2])


def make(section: Section, work: Path) -> None:
    """Run the section's command, in whose words WORKDIR stands for `work`, and put what it prints in its place.

    Exits with a message where sources are changed and not committed: no commit would stand for the figures.
    """
    changed = _git("status", "--porcelain", "--", *SOURCES).strip()
    if changed:
        sys.exit(f"commit first, as figures are of a commit:\n{changed}")
    script, *words = shlex.split(section.command.replace("WORKDIR", str(work)))
    run = subprocess.run([sys.executable, ROOT / script, *words], stdout=subprocess.PIPE, text=True, check=True)
    commit, today = _git("rev-parse", "--short=12", "HEAD").strip(), datetime.datetime.now(datetime.timezone.utc).date()
    put(section, f"{run.stdout.strip()}\n\nMade of commit {commit}, {today}.\n")


def put(section: Section, text: str) -> None:
    whole = section.file.read_text(encoding="utf-8")
    marker = f"<!-- python {section.command} -->\n"
    section.file.write_text(whole.replace(marker + section.text, marker + text), encoding="utf-8")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
