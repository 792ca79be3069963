"""What the runners of cpu.py share: the points that are measured, the files of a work folder, timing and checking.

Runners are processes of their own, some in another virtual environment, so this file imports no more than numpy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
SEED = 6


@dataclass(frozen=True)
class Point:
    """One measurement. context: tokens attended to by the measured one, itself included; of prefill: the prompt's."""

    kind: str  # decode, prefill
    batch: int
    context: int
    threads: int

    @property
    def name(self) -> str:
        return f"prefill {self.context}" if self.kind == "prefill" else f"batch {self.batch} at {self.context}"


@dataclass(frozen=True)
class Files:
    """The work folder."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def gguf(self) -> Path:
        return self.folder / "model-f32.gguf"

    def prompts(self, batch: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [batch, length]; shorter prompts are beginnings of longer ones."""
        vocab = json.loads((self.checkpoint / "config.json").read_text())["vocab_size"]
        rows = [np.random.default_rng([SEED, row]).integers(2, vocab, length) for row in range(batch)]
        return np.stack(rows)

    def logits(self, point: Point) -> Path:
        """The reference's logits [batch, vocab] of the last token of each prompt."""
        return self.folder / "reference" / f"logits-{point.batch}-{point.context}.npy"

    def state(self, runner: str, batch: int, ending: str = ".npy") -> Path:
        """Where a runner keeps the caches of its longest prompts."""
        return self.folder / "state" / f"{runner}-{batch}{ending}"


def measure(step: Callable[[], object], seconds: float = 1.5, most: int = 60) -> list[float]:
    """Milliseconds of each run after warming up, for about `seconds`; at least one run."""
    spent = [_once(step)]
    if spent[0] < 1.0:
        spent = [_once(step)]
    begin = time.perf_counter()
    times: list[float] = []
    while not times or (len(times) < most and time.perf_counter() - begin < seconds):
        times.append(_once(step))
    return [1e3 * t for t in times]


def _once(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def difference(files: Files, point: Point, logits: Floats) -> float:
    """The largest difference from the reference's logits, as a share of the reference's largest."""
    reference = np.load(files.logits(point))
    return float(np.abs(logits - reference).max() / np.abs(reference).max())


@dataclass(frozen=True)
class Job:
    """What a runner is asked: to fill caches for the longest contexts {batch: tokens}, or to measure one point."""

    folder: str
    runner: str
    point: dict[str, Any] | None
    contexts: dict[str, list[int]]
    threads: int

    def command(self, python: str, script: str) -> list[str]:
        return [python, str(Path(__file__).with_name(script)), json.dumps(asdict(self))]

    @classmethod
    def from_argv(cls) -> Job:
        return cls(**json.loads(sys.argv[1]))


def serve(fill: Callable[[Files, Job], None], run: Callable[[Files, Job, Point], dict[str, Any]]) -> None:
    """The main function of a runner: does the job of the command line, and prints its result as the last line."""
    job = Job.from_argv()
    files = Files(Path(job.folder))
    for name in ("reference", "state"):
        (files.folder / name).mkdir(exist_ok=True)
    if job.point is None:
        fill(files, job)
        print(json.dumps({}))
    else:
        print(json.dumps(run(files, job, Point(**job.point))))
