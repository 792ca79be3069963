"""The binaries that plugin libraries ship, in place of what Triton compiles as it runs: called as its kernels are."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.aot.records import POINTER_ALIGNMENT, Binary
from deepseek_trt.plugins.aot.variants import KERNELS

_SHARED_WITHOUT_ASKING = 48 * 1024
_SCALARS = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


class CompiledKernel:
    """Binaries of one kernel: launched as the plugins launch them, on the stream that `stream` gives."""

    def __init__(self, driver: Any, binaries: Sequence[Binary], stream: Callable[[], int]) -> None:
        self.driver, self.binaries, self.stream = driver, binaries, stream
        self.launches = 0
        self._functions: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(
        self, grid: Sequence[int], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: int
    ) -> None:
        """The binary with these constants; it has its own warps: what spilled was compiled with more."""
        binary = self._binary(constants)
        kinds = [arg.type for arg in binary.variant.args]
        values = [_value(kind, arg) for kind, arg in zip(kinds, args, strict=True)]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's scratch pointers
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        launch = (*grid, binary.threads, 1, 1, binary.shared_bytes, self.stream(), ctypes.addressof(pointers), 0)
        _call(self.driver, "cuLaunchKernel", self._load(binary), *launch)
        self.launches += 1

    def resident_blocks(self, **constants: int) -> int:
        """Blocks of the binary with these constants that the first GPU runs at a time, as a plugin asks the driver."""
        binary = self._binary(constants)
        how = (self._load(binary), binary.threads, binary.shared_bytes)
        count = self.driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        blocks: int = _call(self.driver, "cuOccupancyMaxActiveBlocksPerMultiprocessor", *how)
        multiprocessors: int = _call(self.driver, "cuDeviceGetAttribute", count, 0)
        return blocks * multiprocessors

    def _binary(self, constants: dict[str, int]) -> Binary:
        binary = next((b for b in self.binaries if dict(b.variant.constexprs) == constants), None)
        assert binary is not None, f"no binary has {constants}"
        return binary

    def _load(self, binary: Binary) -> Any:
        """The function, its module loaded once and never unloaded."""
        if binary.sha256 not in self._functions:
            module = _call(self.driver, "cuModuleLoadData", binary.image + b"\0")
            function = _call(self.driver, "cuModuleGetFunction", module, binary.entry.encode())
            if binary.shared_bytes > _SHARED_WITHOUT_ASKING:
                limit = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call(self.driver, "cuFuncSetAttribute", function, limit, binary.shared_bytes)
            self._functions[binary.sha256] = function
        return self._functions[binary.sha256]


def _value(kind: str, argument: Any) -> Any:
    if not kind.startswith("*"):
        return _SCALARS[kind](argument)
    assert argument.is_cuda
    assert argument.is_contiguous()
    assert argument.data_ptr() % POINTER_ALIGNMENT == 0
    return ctypes.c_uint64(argument.data_ptr())


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    error, *found = getattr(driver, name)(*arguments)
    assert error == driver.CUresult.CUDA_SUCCESS, f"{name}: {error}"
    return found[0] if found else None


@contextmanager
def shipped_kernels(config: ModelConfig, dtype: str, sm: int, driver: Any, stream: Callable[[], int]) -> Iterator[None]:
    """Have the kernels' modules launch what a plugin library for `sm` would hold of `config`."""
    binaries = compile_all(config, dtype, [sm], jobs=4, fallback=False)
    homes = {
        k: importlib.import_module(f"deepseek_trt.plugins.kernels.{source.module}") for k, source in KERNELS.items()
    }
    stock = {}
    try:
        for kernel in {b.variant.kernel for b in binaries}:
            stock[kernel] = getattr(homes[kernel], kernel)
            own = CompiledKernel(driver, [b for b in binaries if b.variant.kernel == kernel], stream)
            setattr(homes[kernel], kernel, own)
        yield
    finally:
        for kernel, function in stock.items():
            setattr(homes[kernel], kernel, function)
