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
    """One measurement. context: tokens attended to by the measured one, itself included; of others: the prompt's.

    kind: "decode"; "prefill"; "beside", a prompt's first token while `batch` others decode; "quality", of which no time
    is taken: the logits that end `batch` prompts.
    """

    kind: str
    batch: int
    context: int
    threads: int

    @property
    def name(self) -> str:
        return {
            "decode": f"batch {self.batch} at {self.context}",
            "prefill": f"prefill {self.context}",
            "beside": f"first token of {self.context} beside {self.batch} that decode",
            "quality": f"{self.batch} prompts of {self.context}",
        }[self.kind]


@dataclass(frozen=True)
class Files:
    """The work folder; what belongs to one table (cpu_plan.py) lies in a folder of its name."""

    folder: Path
    table: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def bundle(self, form: str) -> Path:
        """form: of the weights, "float32" as the checkpoint's, or what `export --quantize` takes."""
        return self.folder / f"bundle-{form}"

    def gguf(self, form: str) -> Path:
        """form: of the weights, "float32" as the checkpoint's, or llama.cpp's name of a narrow one."""
        return self.folder / f"model-{form}.gguf"

    @property
    def own(self) -> Path:
        return self.folder / self.table

    def prompts(self, batch: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [batch, length]; shorter prompts are beginnings of longer ones."""
        vocab = json.loads((self.checkpoint / "config.json").read_text())["vocab_size"]
        rows = [np.random.default_rng([SEED, row]).integers(2, vocab, length) for row in range(batch)]
        return np.stack(rows)

    def logits(self, point: Point) -> Path:
        """The reference's logits [batch, vocab] of the last token of each prompt."""
        return self.own / "reference" / f"logits-{point.batch}-{point.context}.npy"

    def state(self, runner: str, batch: int, ending: str = ".npy") -> Path:
        """Where a runner keeps the caches of its longest prompts."""
        return self.own / "state" / f"{runner}-{batch}{ending}"


def measure(step: Callable[[], object], seconds: float = 1.5, most: int = 60) -> list[float]:
    """Milliseconds of each run after warming up, for about `seconds`; at least one run.

    What takes a minute runs once, and is not warmed up.
    """
    spent = [_once(step)]
    if spent[0] > 60:
        return [1e3 * spent[0]]
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


def divergence(files: Files, point: Point, logits: Floats) -> dict[str, float]:
    """Of the reference's distribution from that of `logits` [batch, vocab]: mean KL in nats, and the share of equal
    likeliest tokens.
    """
    reference = np.load(files.logits(point)).astype(np.float64)
    theirs, ours = _log_softmax(reference), _log_softmax(logits.astype(np.float64))
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    return {"kl": float(kl.mean()), "top1": float((theirs.argmax(-1) == ours.argmax(-1)).mean())}


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def peak_memory() -> float:
    """MB of this process, the most since the last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e3


def reset_peak_memory() -> float:
    """MB that this process has now, from which the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


@dataclass(frozen=True)
class Job:
    """What a runner is asked: to fill caches for the longest contexts {batch: tokens}, or to measure one point.

    form: of the weights, in the runner's words.
    """

    folder: str
    table: str
    runner: str
    form: str
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
    files = Files(Path(job.folder), job.table)
    for name in ("reference", "state"):
        (files.own / name).mkdir(parents=True, exist_ok=True)
    if job.point is None:
        fill(files, job)
        print(json.dumps({}))
    else:
        print(json.dumps(run(files, job, Point(**job.point))))
