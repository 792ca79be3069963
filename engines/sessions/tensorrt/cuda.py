"""CudaDevice: an NVIDIA GPU through the CUDA driver. The only file that calls it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.sessions.tensorrt.device import Pinned
from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.aot.records import POINTER_ALIGNMENT

INSTALL = "pip install cuda-bindings"
_SHARED_WITHOUT_ASKING = 48 * 1024
NO_GPU = "use --backend ort, or a machine with an NVIDIA GPU and its driver"


def open_device(ordinal: int = 0) -> CudaDevice:
    """GPU number `ordinal`; BackendError saying what to do where there is none, or no cuda-python."""
    return CudaDevice(_started_driver(), ordinal)


def _started_driver() -> Any:
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(f"cuda-python cannot be imported ({error}): {INSTALL}") from None
    try:
        status = driver.cuInit(0)[0]
    except RuntimeError as missing:  # the bindings look for libcuda at the first call
        raise BackendError(f"there is no NVIDIA driver on this machine ({missing}): {NO_GPU}") from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the NVIDIA driver finds no GPU ({_words(driver, status)}): {NO_GPU}")
    return driver


def visible_gpu() -> str | None:
    """The first GPU's name, or None where there is no driver, no cuda-python or no GPU; takes no memory on it."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS or not driver.cuDeviceGetCount()[1]:
            return None
        return _text(driver.cuDeviceGetName(256, driver.cuDeviceGet(0)[1])[1])
    except (ImportError, RuntimeError):  # the bindings look for libcuda at the first call
        return None


def visible_sm() -> int:
    """The first GPU's SM version, e.g. 90; takes no memory on it. BackendError where `open_device` raises it."""
    driver = _started_driver()
    device = _first(driver, driver.cuDeviceGet(0))
    kind = driver.CUdevice_attribute
    wanted = (kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    major, minor = (int(_first(driver, driver.cuDeviceGetAttribute(name, device))) for name in wanted)
    return 10 * major + minor


def visible_memory() -> int:
    """Bytes of the first GPU's memory, in use or not. BackendError where `open_device` raises it."""
    driver = _started_driver()
    return int(_first(driver, driver.cuDeviceTotalMem(_first(driver, driver.cuDeviceGet(0)))))


def _first(driver: Any, answer: tuple[Any, ...]) -> Any:
    if answer[0] != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the NVIDIA driver finds no GPU ({_words(driver, answer[0])}): {NO_GPU}")
    return answer[1]


class CudaDevice:
    """A Device over cuda.bindings.driver (given, so that tests can give another). It shares CUDA's primary context,
    which TensorRT and torch use too.
    """

    def __init__(self, driver: Any, ordinal: int = 0) -> None:
        self._driver = driver
        count = self._call("cuDeviceGetCount")
        if ordinal >= count:
            raise BackendError(f"there is no GPU {ordinal}; the driver knows {count}")
        self._device = self._call("cuDeviceGet", ordinal)
        self.name = _text(self._call("cuDeviceGetName", 256, self._device))
        kind = driver.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device)
        minor = self._call("cuDeviceGetAttribute", kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device)
        self.sm = 10 * int(major) + int(minor)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.activate()
        self._stream = self._call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        self._modules: list[Any] = []
        self._closed = False

    def activate(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, nbytes: int, what: str) -> int:
        free, _ = self._call("cuMemGetInfo")
        error, *found = self._driver.cuMemAlloc(max(nbytes, 1))
        if error == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise BackendError(
                f"{nbytes / 1e9:.2f} GB are needed for {what}; {self.name} has {free / 1e9:.2f} GB free: "
                "use fewer or shorter prompts, a smaller --max-batch-size in the build, or a larger GPU"
            )
        self._check("cuMemAlloc", error)
        self._memory.append(int(found[0]))
        return int(found[0])

    def pin(self, nbytes: int) -> Pinned:
        address = int(self._call("cuMemAllocHost", max(nbytes, 1)))
        self._pinned.append(address)
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)))

    def unpin(self, memory: Pinned) -> None:
        self._pinned.remove(memory.address)
        self._call("cuMemFreeHost", memory.address)

    def zero(self, address: int, nbytes: int) -> None:
        self._call("cuMemsetD8Async", address, 0, nbytes, self._stream)

    def upload(self, target: int, source: int, nbytes: int) -> None:
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, self._stream)

    def download(self, target: int, source: int, nbytes: int) -> None:
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def read(self, source: int, array: npt.NDArray[Any]) -> None:
        self.synchronize()
        self._call("cuMemcpyDtoH", array.ctypes.data, source, array.nbytes)

    def write(self, target: int, array: npt.NDArray[Any]) -> None:
        self.synchronize()
        self._call("cuMemcpyHtoD", target, array.ctypes.data, array.nbytes)

    def mark(self) -> Any:
        event = self._call("cuEventCreate", int(self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._call("cuEventRecord", event, self._stream)
        return event

    def wait(self, mark: Any) -> None:
        self._call("cuEventSynchronize", mark)
        self._call("cuEventDestroy", mark)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        # Thread-local: what other threads do meanwhile does not spoil the capture.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            _, spoilt = self._driver.cuStreamEndCapture(self._stream)
            if spoilt is not None and int(spoilt):
                self._driver.cuGraphDestroy(spoilt)
            raise
        captured = self._call("cuStreamEndCapture", self._stream)
        try:
            graph = self._call("cuGraphInstantiate", captured, 0)
        finally:
            self._call("cuGraphDestroy", captured)
        self._graphs.append(graph)
        return graph

    def launch(self, graph: Any) -> None:
        self._call("cuGraphLaunch", graph, self._stream)

    def load_kernel(self, image: bytes, entry: str, shared_bytes: int) -> Any:
        module = self._call("cuModuleLoadData", image + b"\0")  # PTX is text that ends in a zero byte
        self._modules.append(module)
        kernel = self._call("cuModuleGetFunction", module, entry.encode())
        if shared_bytes > _SHARED_WITHOUT_ASKING:
            limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", kernel, limit, shared_bytes)
        return kernel

    def launch_kernel(
        self, kernel: Any, grid: tuple[int, int], threads: int, shared_bytes: int, addresses: Sequence[int]
    ) -> None:
        unaligned = [address for address in addresses if address % POINTER_ALIGNMENT]
        assert not unaligned, "the kernels were compiled for aligned addresses"
        values = (ctypes.c_uint64 * (len(addresses) + 2))(*addresses)  # and Triton's two scratch pointers, 0
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(values))(*(first + 8 * i for i in range(len(values))))
        how = (*grid, 1, threads, 1, 1, shared_bytes, self._stream, ctypes.addressof(pointers), 0)
        self._call("cuLaunchKernel", kernel, *how)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for function, handle in self._held():
            with contextlib.suppress(BackendError):  # after a fault the driver refuses everything
                self._call(function, handle)

    def _held(self) -> Iterator[tuple[str, Any]]:
        """What to call with what, to end in order."""
        yield "cuCtxSetCurrent", self._context
        yield "cuStreamSynchronize", self._stream
        yield from (("cuGraphExecDestroy", graph) for graph in self._graphs)
        yield from (("cuModuleUnload", module) for module in self._modules)
        yield from (("cuMemFreeHost", address) for address in self._pinned)
        yield from (("cuMemFree", address) for address in self._memory)
        yield "cuStreamDestroy", self._stream
        yield "cuDevicePrimaryCtxRelease", self._device

    def _call(self, function: str, *arguments: Any) -> Any:
        """What the driver gives beside its error code: nothing, one thing, or a tuple."""
        error, *found = getattr(self._driver, function)(*arguments)
        self._check(function, error)
        return found[0] if len(found) == 1 else tuple(found)

    def _check(self, function: str, error: Any) -> None:
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"the GPU refuses {function}: {_words(self._driver, error)}")


def _words(driver: Any, error: Any) -> str:
    failed, words = driver.cuGetErrorString(error)
    return _text(words) if failed == driver.CUresult.CUDA_SUCCESS and words else str(error)


def _text(raw: bytes | str) -> str:
    return raw.decode(errors="replace").rstrip("\0 ") if isinstance(raw, bytes) else raw
