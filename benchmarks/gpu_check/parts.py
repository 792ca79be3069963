"""Parts: what the check does, each in child processes with a time limit, so that a fault is a row and not the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_check.items import Setting
from gpu_check.places import ROOT, name_rtx
from gpu_check.rows import Row

_LEAST = 5.0  # seconds: not enough to start anything
_LAST_WORDS = 400  # characters of what a child that died said


@dataclass(frozen=True)
class Part:
    """`module` has `items`; `seconds` is the most that the part may take in all."""

    name: str
    module: str
    seconds: float


_REHEARSED = 10.0  # times as long: an interpreter on a processor that others may use
# What all of them may take together is less: the last get what the first left.
PARTS = (
    Part("machine", "gpu_check.machine", 30),
    Part("kernels", "gpu_check.checks", 180),
    Part("speed", "gpu_check.speeds", 150),
    Part("engines", "gpu_check.engines", 120),
    Part("memcheck", "gpu_check.checks", 120),
)


def run_part(part: Part, setting: Setting, work: Path, seconds: float) -> Iterator[Row]:
    """All rows of a part. Where a child dies, that is a row, and another goes on behind the item that it died at."""
    most = part.seconds * (_REHEARSED if setting.rehearsal else 1.0)
    end, first = time.monotonic() + min(seconds, most), 0
    if end - time.monotonic() < _LEAST:
        yield Row(part.name, part.name, "not run", "no time was left")
        return
    if part.name == "memcheck":
        yield from _memcheck(part, setting, work, end)
        return
    while True:
        child = run_child(part, first, setting, work, end - time.monotonic())
        yield from child.rows
        if child.code == 0:
            return
        yield Row(part.name, child.at or part.name, "FAILED", child.words)
        if child.at is None or child.timed_out or end - time.monotonic() < _LEAST:
            note = "no time was left" if child.timed_out else "nothing of it could be started"
            yield Row(part.name, "what follows", "not run", note)
            return
        first = child.index + 1


@dataclass(frozen=True)
class Child:
    """What a child found, and where it ended: at the item `at`, or None where it had begun none."""

    rows: tuple[Row, ...]
    code: int
    at: str | None
    index: int
    timed_out: bool
    words: str


def run_child(
    part: Part,
    first: int,
    setting: Setting,
    work: Path,
    seconds: float,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] = {},
) -> Child:
    """Run the part's items from `first` on for at most `seconds`; all that the child started ends with it."""
    events, log = work / f"{part.name}-{first}.jsonl", work / f"{part.name}-{first}.log"
    events.touch()
    command = [
        *prefix,
        sys.executable,
        "-m",
        "gpu_check.child",
        part.module,
        str(first),
        str(events),
        str(work / "tree"),
    ]
    paths = os.pathsep.join((str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])))
    named = str(name_rtx(work / "names", setting.prepared.sites))
    libraries = os.pathsep.join((named, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *setting.to_words()],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": libraries, **environment},
            start_new_session=True,
        )
        try:
            code, timed_out = process.wait(max(seconds, 1.0)), False
        except subprocess.TimeoutExpired:
            code, timed_out = -1, True
        finally:
            _end(process)
    said = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    begun = [event for event in said if "begin" in event]
    ended = {event["end"] for event in said if "end" in event}
    open_item = begun[-1] if begun and begun[-1]["begin"] not in ended else None
    words = f"not done after {seconds:.0f} s" if timed_out else _last_words(log, code)
    return Child(
        rows=tuple(Row(**event["row"]) for event in said if "row" in event),
        code=code,
        at=open_item["name"] if open_item else None,
        index=open_item["begin"] if open_item else -1,
        timed_out=timed_out,
        words=words,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child's whole session; it has one of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: Path, code: int) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {text.splitlines()[-1][:_LAST_WORDS] if text else 'no words'}"


def _memcheck(part: Part, setting: Setting, work: Path, end: float) -> Iterator[Row]:
    """The kernels' cases of few tokens once more, under compute-sanitizer's memcheck."""
    tool = find_sanitizer()
    if tool is None:
        yield Row(part.name, "compute-sanitizer", "not run", "it is not on this machine")
        return
    log = work / "memcheck.txt"
    prefix = (tool, "--tool", "memcheck", "--report-api-errors", "no", "--log-file", str(log), "--error-exitcode", "99")
    # Each tensor is an allocation of its own: within torch's pools a stray access would go unseen.
    alone: dict[str, Any] = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    child = run_child(part, 0, replace(setting, few=True), work, end - time.monotonic(), prefix, alone)
    yield from (replace(row, part=part.name) for row in child.rows)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    yield verdict(part.name, text, child)


def verdict(part: str, log: str, child: Child) -> Row:
    """One row of what memcheck's log says; a run that did not end well is no clean one."""
    lines = [line.strip("= \t") for line in log.splitlines()]
    errors = [line for line in lines if line.startswith(("Invalid ", "Out-of-range", "Misaligned", "Program hit"))]
    summary = next((line for line in reversed(lines) if line.startswith("ERROR SUMMARY")), "")
    if child.code == 0 and summary.startswith("ERROR SUMMARY: 0 errors"):
        return Row(part, "memcheck", "good", summary)
    what = "; ".join((errors[0] if errors else child.words, summary or "no summary"))
    at = f" at {child.at}" if child.at else ""
    return Row(part, "memcheck", "FAILED", f"{what}{at}")


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or where CUDA's toolkit puts it."""
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)
