"""Runs cases in forked processes: a traceback, a hang, a crash or a gigabyte is a finding, not the end of the run."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

MEMORY = 2**30  # bytes that a process may grow by
_BLOCK = 250  # cases a process
_LONGEST = 2000  # characters of a sentence
REFUSED, RIGHT = "refused", "accepted and right"


class DisagreementError(Exception):
    """An acceptance where the independent reader refuses, or reads something else."""


class Target(Protocol):
    """One kind of file, or of request."""

    name: str
    patience: float  # seconds that a case may take

    def prepare(self, folder: Path) -> None:
        """Make the good files once, before processes are forked."""

    def change(self, rng: Random, folder: Path) -> None:
        """Write the good files to `folder`, one of them changed."""

    def read(self, folder: Path) -> Any:
        """What the product reads; a DeepseekTrtError where it refuses."""

    def judge(self, folder: Path, found: Any) -> None:
        """Raise DisagreementError where an independent reader does not agree with what was read."""


@dataclass
class Tally:
    """What became of the cases, and a line for each finding."""

    target: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    sentences: Counter[str] = field(default_factory=Counter)

    @property
    def cases(self) -> int:
        return sum(self.counts.values())

    def add(self, number: int, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        if kind not in (REFUSED, RIGHT):
            self.findings.append(f"{kind}: python tests/fuzz/run.py {self.target} {number}\n  {detail}")

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        speed = self.seconds / max(self.cases, 1)
        return f"{self.target}: {self.cases} cases ({1000 * speed:.0f} s for 1,000): {counts}"


def run_cases(target: Target, numbers: Iterable[int], seconds: float = float("inf")) -> Tally:
    """Run the cases of these numbers, or as many of them as begin within `seconds`."""
    tally, left = Tally(target.name), list(numbers)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        target.prepare(Path(place))
        started = time.monotonic()
        while left and time.monotonic() - started < seconds:
            done = _run_block(target, left[:_BLOCK], Path(place), tally)
            left = left[done:]
        tally.seconds = time.monotonic() - started
    return tally


def case(target: Target, number: int, folder: Path) -> tuple[str, str]:
    """One case in this process: its outcome, and what is to be said of it."""
    from deepseek_trt.export.errors import DeepseekTrtError

    target.change(Random(f"{target.name} {number}"), folder)
    try:
        found = target.read(folder)
    except DeepseekTrtError as error:
        return _judged(str(error))
    except MemoryError:
        return "memory", traceback.format_exc(limit=-4)
    except BaseException:
        return "traceback", traceback.format_exc(limit=-6)
    try:
        target.judge(folder, found)
    except DisagreementError as wrong:
        return "wrong", str(wrong)
    return RIGHT, ""


def _judged(sentence: str) -> tuple[str, str]:
    """A refusal is one line without control characters."""
    if not sentence.strip() or len(sentence) > _LONGEST or not sentence.isprintable():
        return "no plain sentence", repr(sentence[:_LONGEST])
    return REFUSED, sentence


def _run_block(target: Target, numbers: list[int], folder: Path, tally: Tally) -> int:
    """Run them in one process; how many were done, one that ended the process included."""
    receiving, sending = os.pipe()
    with tempfile.TemporaryFile() as log:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if child == 0:
            os.close(receiving)
            _child(target, numbers, folder, sending, log.fileno())
        os.close(sending)
        lines = _Lines(receiving)
        for done, number in enumerate(numbers):
            line = lines.next(target.patience)
            if line:
                tally.add(number, *json.loads(line))
                continue
            kind = _ended(child, "hang" if line is None else "crash")
            log.seek(0)
            tally.add(number, kind, log.read()[-3000:].decode(errors="replace"))
            os.close(receiving)
            return done + 1
        os.waitpid(child, 0)
        os.close(receiving)
    return len(numbers)


def _ended(child: int, kind: str) -> str:
    if kind == "hang":
        os.kill(child, signal.SIGUSR1)  # faulthandler writes where it is
        time.sleep(0.2)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return kind if kind == "hang" else f"crash ({os.waitstatus_to_exitcode(status)})"


def _child(target: Target, numbers: list[int], folder: Path, sending: int, log: int) -> None:
    """Never returns."""
    try:
        os.dup2(log, 2)
        faulthandler.enable(log)
        faulthandler.register(signal.SIGUSR1, log, all_threads=True)
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.setrecursionlimit(1000)
        with os.fdopen(sending, "w", buffering=1) as out:
            for number in numbers:
                print(json.dumps(case(target, number, folder)), file=out)
    except BaseException:
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


class _Lines:
    """Lines of a pipe, with a limit of time for each."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""

    def next(self, seconds: float) -> str | None:
        """The next line; "" at the end, None where none comes in time."""
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return None
            data = os.read(self._descriptor, 2**16)
            if not data:
                return ""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()
