"""How fast this machine reads memory, as a runner of cpu.py: the floor of every decode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from cpu_point import Files, Job, Point, measure, serve

_BYTES = 2**30


def run(files: Files, job: Job, point: Point) -> dict[str, Any]:
    return {"error": 0.0, "ms": measure(read_in(point.threads))}


def read_in(threads: int) -> Callable[[], None]:
    """A step that reads so many bytes as gigabytes_a_second counts."""
    parts = np.split(np.ones(_BYTES // 8), threads)

    def step() -> None:
        readers = [threading.Thread(target=np.max, args=(part,)) for part in parts]  # numpy lets go of the GIL
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    return step


def gigabytes_a_second(milliseconds: float) -> float:
    return _BYTES / 1e6 / milliseconds


if __name__ == "__main__":
    serve(lambda files, job: None, run)
