"""Seconds of a call: the median of several runs of one graph of CALLS calls, which take turns with their operands.

The L2 cache is filled before every run by reading other memory: writing would leave dirty lines, whose way back to
memory the timed calls would wait for. Copies of the operands that together exceed the cache keep one call from finding
what the one before it has read.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_check.items import Gpu

CALLS = 20  # of one graph


class TorchGpu:
    """The first GPU of this machine, through torch."""

    device = "cuda"

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.sm = 10 * major + minor
        self.name = str(torch.cuda.get_device_name())
        self._read: torch.Tensor | None = None
        self._executor: Callable[..., None] | None = None

    def executor(self) -> Callable[..., None]:
        """What runs shipped binaries, on torch's current stream; one for all, so that equal PTX is compiled once."""
        if self._executor is None:
            from cuda.bindings import driver

            from gpu_check.launching import DriverExecutor

            self._executor = DriverExecutor(driver, lambda: int(torch.cuda.current_stream().cuda_stream))
        return self._executor

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def flush(self) -> None:
        if self._read is None:  # four times the cache
            size = max(self.cache_bytes(), 2**25)
            self._read = torch.zeros(size, dtype=torch.float32, device="cuda")
            self._sum = torch.zeros((), dtype=torch.float32, device="cuda")
        torch.sum(self._read, dim=0, out=self._sum)

    def seconds(self, work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> float:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(0).L2_cache_size)


class Timer:
    """Seconds a call, as the module says."""

    def __init__(self, runs: int, warmup: int, gpu: Gpu, calls: int = CALLS) -> None:
        self._runs, self._warmup, self._gpu, self._calls = runs, warmup, gpu, calls

    def __call__(self, *calls: Callable[[], object]) -> float:
        def all_calls() -> None:
            for call in itertools.islice(itertools.cycle(calls), self._calls):
                call()

        replay = self._gpu.capture(all_calls)
        times = []
        for _ in range(self._warmup + self._runs):
            self._gpu.flush()
            times.append(self._gpu.seconds(replay))
        return statistics.median(times[self._warmup :]) / self._calls


def copies_for(nbytes: float, cache: int, free: float) -> int:
    """Copies of operands of `nbytes` whose turns leave none of them in a cache; as many as fit into `free` bytes."""
    wanted = min(CALLS, math.ceil(2 * cache / nbytes) + 1)
    return max(1, min(wanted, int(free // nbytes)))


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached: bytes and flops a second."""

    copy: float
    matmul: float


def measure_ceilings(timer: Timer, device: str, nbytes: int = 2**30, n: int = 8192) -> Ceilings:
    """A copy of 1 GiB, and a product of two 8192 x 8192 matrices of random bfloat16."""
    source, target = (torch.empty(nbytes, dtype=torch.int8, device=device) for _ in range(2))
    copy = 2 * nbytes / timer(lambda: target.copy_(source))
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return Ceilings(copy, 2 * n**3 / timer(lambda: torch.mm(a, b, out=out)))
