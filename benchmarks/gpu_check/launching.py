"""Shipped binaries in the place of the kernels that Triton would compile: launched as the wrappers launch those.

The wrappers keep computing grids and arguments; what runs is the library's code, through the CUDA driver. Each launch
is kept, so that it can be run again alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_check.shipped import ShippedBinary

ALIGNMENT = 16  # bytes: what kernels are compiled to load at once
PTX_TILES_SM = 86  # whose tiles the PTX has
_SHARED_WITHOUT_ASKING = 48 * 1024
_KERNELS = "deepseek_trt.plugins.kernels"
_SCALARS = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


class Executor(Protocol):
    """What runs a binary: a GPU, or a stand-in."""

    def __call__(self, binary: ShippedBinary, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None: ...


@dataclass(frozen=True)
class Launch:
    """One launch with all it needs; `arguments` keep their tensors alive."""

    binary: ShippedBinary
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    execute: Executor

    def __call__(self) -> None:
        self.execute(self.binary, self.grid, self.arguments)


class ShippedKernel:
    """Binaries of one kernel, called as Triton's kernels are; `journal` gets every launch."""

    def __init__(self, binaries: Sequence[ShippedBinary], execute: Executor, journal: list[Launch]) -> None:
        self.binaries, self.execute, self.journal = binaries, execute, journal

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        x, y, z, *_ = (*grid, 1, 1)
        return functools.partial(self._launch, (x, y, z))

    def _launch(
        self, grid: tuple[int, int, int], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: int
    ) -> None:
        """The binary with these constants; it has its own warps: what spilled was compiled with more."""
        binary = next((b for b in self.binaries if _of_wrappers(b) == constants), None)
        if binary is None:
            raise LookupError(f"no binary of {self.binaries[0].kernel} has {constants}")
        launch = Launch(binary, grid, args, self.execute)
        launch()
        self.journal.append(launch)


def _of_wrappers(binary: ShippedBinary) -> dict[str, int]:
    """Its constants as a wrapper gives them: PDL is the table of variants' own."""
    return {name: value for name, value in binary.constants.items() if name != "PDL"}


class DriverExecutor:
    """Through the CUDA driver, on the stream that `stream` gives; images are loaded once and never unloaded."""

    def __init__(self, driver: Any, stream: Callable[[], int]) -> None:
        self.driver, self.stream = driver, stream
        self._functions: dict[tuple[str, str], Any] = {}

    def __call__(self, binary: ShippedBinary, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        kinds = argument_types(binary)
        values = [_value(kind, argument) for kind, argument in zip(kinds, arguments, strict=True)]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's scratch pointers
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        launch = (*grid, binary.threads, 1, 1, binary.shared_bytes, self.stream(), ctypes.addressof(pointers), 0)
        self._call("cuLaunchKernel", self._load(binary), *launch)

    def _load(self, binary: ShippedBinary) -> Any:
        key = (binary.sha256, binary.entry)
        if key not in self._functions:
            module = self._call("cuModuleLoadData", binary.image + b"\0")
            function = self._call("cuModuleGetFunction", module, binary.entry.encode())
            if binary.shared_bytes > _SHARED_WITHOUT_ASKING:
                limit = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", function, limit, binary.shared_bytes)
            self._functions[key] = function
        return self._functions[key]

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *found = getattr(self.driver, name)(*arguments)
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {error}")
        return found[0] if found else None


def argument_types(binary: ShippedBinary) -> list[str]:
    """The types of what the kernel takes at launch, in order: "*bf16", "*i32", "i32", "fp32"."""
    from deepseek_trt.plugins.aot.variants import KERNELS

    return [part.split()[1] for part in KERNELS[binary.kernel].args.split(", ")]


def _value(kind: str, argument: Any) -> Any:
    if not kind.startswith("*"):
        return _SCALARS[kind](argument)
    if not (argument.is_cuda and argument.is_contiguous() and argument.data_ptr() % ALIGNMENT == 0):
        raise ValueError(f"a kernel takes contiguous tensors of the GPU at multiples of {ALIGNMENT} bytes")
    return ctypes.c_uint64(argument.data_ptr())


def _units_of(binaries: Sequence[ShippedBinary]) -> dict[int, int]:
    """By formats' numbers, what the columns of all matrices of the model are multiples of."""
    return {b.constants["FORMAT"]: b.constants["UNIT"] for b in binaries if "UNIT" in b.constants}


def _unit(units: Mapping[int, int], kind: Any, columns: Iterable[int]) -> int:
    """The unit that a library was compiled for, where a wrapper would take that of its matrix alone."""
    unit = units.get(kind.code)
    if unit is None or any(count % unit for count in columns):
        raise LookupError(f"no binary is for {kind.name} with {list(columns)} columns")
    return unit


@contextmanager
def shipped_kernels(binaries: Sequence[ShippedBinary], execute: Executor) -> Iterator[list[Launch]]:
    """Have the kernels' modules run `binaries`, of one chip; gives the journal of what was launched."""
    from deepseek_trt.plugins.aot.variants import KERNELS
    from deepseek_trt.plugins.kernels import chips
    from deepseek_trt.plugins.kernels.interpreter import KERNEL_MODULES
    from deepseek_trt.plugins.kernels.narrow.constants import linear_unit

    (target,) = {(b.sm, b.is_ptx) for b in binaries}
    tiles_sm = PTX_TILES_SM if target[1] else target[0]
    journal: list[Launch] = []
    stock: list[tuple[Any, str, Any]] = []
    modules = [importlib.import_module(f"{_KERNELS}.{name}") for name in (*KERNEL_MODULES, "sampling.run")]

    def replace(name: str, old: Any, new: Any) -> None:
        """Wherever a wrapper has it by that name."""
        for module in modules:
            if getattr(module, name, None) is old:
                stock.append((module, name, old))
                setattr(module, name, new)

    try:
        for kernel in sorted({b.kernel for b in binaries}):
            own = getattr(importlib.import_module(f"{_KERNELS}.{KERNELS[kernel].module}"), kernel)
            replace(kernel, own, ShippedKernel([b for b in binaries if b.kernel == kernel], execute, journal))
        replace("chip_of", chips.chip_of, lambda tensor: tiles_sm)
        replace("linear_unit", linear_unit, functools.partial(_unit, _units_of(binaries)))
        yield journal
    finally:
        for module, name, value in reversed(stock):
            setattr(module, name, value)
