"""Stand-ins where there is no GPU: binaries are found as ever, and Triton's interpreter runs their kernels."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu_check.shipped import ShippedBinary


class InterpretedExecutor:
    """The kernel of a binary's name, interpreted with the binary's constants."""

    def __init__(self) -> None:
        from deepseek_trt.plugins.aot.variants import KERNELS
        from deepseek_trt.plugins.kernels import interpreter

        interpreter.enable()
        homes = {
            name: importlib.import_module(f"deepseek_trt.plugins.kernels.{k.module}") for name, k in KERNELS.items()
        }
        self._kernels = {name: getattr(home, name) for name, home in homes.items()}

    def __call__(self, binary: ShippedBinary, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        constants = {name: value for name, value in binary.constants.items() if name != "PDL"}  # a GPU's own waiting
        self._kernels[binary.kernel][grid](*arguments, **constants)


class RehearsedGpu:
    """The processor in a GPU's place: what is captured is run again, by the clock."""

    device = "cpu"
    name = "none"

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self._executor = InterpretedExecutor()

    def executor(self) -> Callable[..., None]:
        return self._executor

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def flush(self) -> None: ...

    def seconds(self, work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def synchronize(self) -> None: ...

    def free_bytes(self) -> float:
        return 2.0**33

    def cache_bytes(self) -> int:
        return 2**10
