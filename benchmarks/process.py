"""Run a command as a process of its own: its seconds, its output, and the peak memory of it and its children."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Took:
    """What one command took. Memory is resident memory; pages shared by two of its processes count twice."""

    seconds: float
    peak_mb: float
    output: str


def run_measured(command: list[str]) -> Took:
    """Run to its end; raises subprocess.CalledProcessError where it fails.

    The peak is the larger of two: the root process's own high-water mark (exact), and the sum over it and its children,
    looked at every 50 ms. (ru_maxrss would not do: a child's begins at its parent's.)
    """
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            together = sum(_kilobytes(pid, "VmRSS") for pid in _tree(process.pid))
            peak = max(peak, together, _kilobytes(process.pid, "VmHWM"))
            time.sleep(_EVERY)
        seconds = time.perf_counter() - begin
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Took(seconds, peak * 1024 / 1e6, output)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return
    for child in children:
        yield from _tree(int(child))


def _kilobytes(pid: int, field: str) -> int:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0
