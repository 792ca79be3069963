"""Memory bandwidth as this machine has it: measured, not looked up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from deepseek_trt.engines.sessions.tensorrt.device import Device

CPU_BYTES = 512 * 2**20  # far above any cache
GPU_BYTES = 2**30
REPEATS = 5


def read_bandwidth(threads: int, nbytes: int = CPU_BYTES, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that `threads` threads (0: one a core) read from memory, at best of several passes."""
    threads = threads or os.cpu_count() or 1
    parts = [np.ones(nbytes // 8 // threads, dtype=np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = min(_seconds(lambda: list(pool.map(np.max, parts)), clock) for _ in range(REPEATS + 1))
    return sum(part.nbytes for part in parts) / seconds


def copy_bandwidth(device: Device, nbytes: int = GPU_BYTES, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes together."""
    source, target = (device.allocate(nbytes, "measuring the memory's bandwidth") for _ in range(2))

    def copy() -> None:
        device.copy(target, source, nbytes)
        device.synchronize()

    copy()
    return 2 * nbytes / min(_seconds(copy, clock) for _ in range(REPEATS))


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start
