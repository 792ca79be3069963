"""CudaDevice against the real bindings' names and numbers of arguments; what it does on a GPU is tests/gpu's."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest

from deepseek_trt.engines.sessions.tensorrt import cuda
from deepseek_trt.engines.sessions.tensorrt.cuda import CudaDevice, open_device, visible_memory, visible_sm
from deepseek_trt.export.errors import BackendError

bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


class Recorder:
    """Takes only calls that the bindings know, with as many arguments as they take; memory is the host's."""

    def __init__(self, room=1 << 20, failing=()):
        self.calls: list[str] = []
        self.failing, self.room = dict(failing), room
        self._blocks: dict[int, ctypes.Array] = {}

    def __getattr__(self, name):
        real = getattr(bindings, name)
        if not name.startswith("cu"):
            return real
        signature = real.__doc__.splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        expected = len(inside.split(",")) if inside else 0

        def call(*arguments):
            assert len(arguments) == expected, f"{signature} was given {arguments}"
            self.calls.append(name)
            if name in self.failing:
                return (self.failing[name], None)
            return (bindings.CUresult.CUDA_SUCCESS, *self.found(name, arguments))

        return call

    def found(self, name, arguments):
        if name == "cuDeviceGetAttribute":
            major = bindings.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
            return (8 if arguments[0] == major else 6,)
        if name in ("cuMemAlloc", "cuMemAllocHost"):
            block = (ctypes.c_uint8 * arguments[0])()
            self._blocks[ctypes.addressof(block)] = block
            return (ctypes.addressof(block),)
        if name in ("cuMemcpyHtoD", "cuMemcpyDtoH"):
            ctypes.memmove(*arguments)
        one = {"cuDeviceGetName": b"A card\0\0", "cuDeviceGetCount": 1, "cuGetErrorString": b"invalid argument"}
        if name in one:
            return (one[name],)
        if name == "cuLaunchKernel":
            self.found_launch(arguments)
        if name == "cuDeviceTotalMem":
            return (self.room,)
        if name == "cuMemGetInfo":
            return (self.room, self.room)
        handles = ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate", "cuStreamEndCapture")
        handles += ("cuModuleLoadData", "cuModuleGetFunction")
        return (3,) if name in (*handles, "cuGraphInstantiate") else ()


def test_speaks_the_bindings_language():
    driver = Recorder()
    device = CudaDevice(driver)
    assert (device.name, device.sm, device.stream) == ("A card", 86, 3)
    memory, pinned = device.allocate(64, "a test"), device.pin(32)
    pinned.array[:] = 7
    device.zero(memory, 64)
    device.copy(memory, device.allocate(64, "a test"), 32)
    device.upload(memory, pinned.address, 32)
    device.download(pinned.address, memory, 32)
    device.wait(device.mark())
    device.write(memory, np.arange(8, dtype=np.uint8))
    back = np.zeros(8, dtype=np.uint8)
    device.read(memory, back)
    assert back.tolist() == list(range(8))
    device.launch(device.capture(lambda: device.zero(memory, 64)))
    device.unpin(pinned)
    device.close()
    device.close()
    ends = ["cuGraphExecDestroy", "cuMemFree", "cuMemFree", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"]
    assert [name for name in driver.calls if name in ends] == ends


def test_kernels_are_launched_as_triton_compiled_them():
    """All arguments are addresses; behind them come Triton's two scratch pointers, which are 0."""
    driver = Recorder()
    device = CudaDevice(driver)
    kernel = device.load_kernel(b"an image", "sample_pick", 60_000)
    seen = []
    driver.found_launch = lambda arguments: seen.append((arguments[:8], read_addresses(arguments[9], 5)))
    device.launch_kernel(kernel, (32, 2), 256, 60_000, (0x1000, 0x2000, 0x3000))
    assert seen == [((3, 32, 2, 1, 256, 1, 1, 60_000), [0x1000, 0x2000, 0x3000, 0, 0])]
    with pytest.raises(AssertionError, match="aligned"):
        device.launch_kernel(kernel, (1, 1), 256, 0, (0x1008,))
    device.close()
    assert [name for name in driver.calls if name.startswith(("cuModule", "cuFuncSet", "cuLaunch"))] == [
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchKernel",
        "cuModuleUnload",
    ]


def read_addresses(pointers, count):
    """What the first `count` kernel parameters hold."""
    places = (ctypes.c_void_p * count).from_address(pointers)
    return [ctypes.c_uint64.from_address(place).value for place in places]


def test_the_gpus_memory(monkeypatch):
    monkeypatch.setattr(cuda, "_started_driver", lambda: Recorder(room=80 * 10**9))
    assert visible_memory() == 80 * 10**9
    assert visible_sm() == 86


def test_a_full_gpu_names_what_has_no_room():
    driver = Recorder(room=10**9, failing={"cuMemAlloc": bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY})
    with pytest.raises(BackendError, match=r"31.00 GB are needed for the weights; A card has 1.00 GB free"):
        CudaDevice(driver).allocate(31 * 10**9, "the weights")


def test_a_refused_call_is_named():
    driver = Recorder(failing={"cuMemsetD8Async": bindings.CUresult.CUDA_ERROR_INVALID_VALUE})
    with pytest.raises(BackendError, match="the GPU refuses cuMemsetD8Async: invalid argument"):
        CudaDevice(driver).zero(0, 1)


def test_a_capture_that_fails_is_ended():
    driver = Recorder()

    def fail():
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        CudaDevice(driver).capture(fail)
    assert driver.calls[-2:] == ["cuStreamEndCapture", "cuGraphDestroy"]


def test_close_goes_on_after_a_fault():
    driver = Recorder(failing={"cuStreamSynchronize": bindings.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS})
    CudaDevice(driver).close()
    assert driver.calls[-1] == "cuDevicePrimaryCtxRelease"


def test_another_gpu_than_there_is():
    with pytest.raises(BackendError, match="there is no GPU 4; the driver knows 1"):
        CudaDevice(Recorder(), 4)


def test_no_driver_says_what_to_do(monkeypatch):
    def missing(flags):
        raise RuntimeError("libcuda is not there")

    monkeypatch.setattr(bindings, "cuInit", missing)
    with pytest.raises(BackendError, match=r"no NVIDIA driver .*libcuda is not there.*--backend ort"):
        open_device()


def test_no_bindings_says_how_to_install_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendError, match="pip install cuda-bindings"):
        open_device()
