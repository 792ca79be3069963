"""A GPU and a TensorRT that are not there: memory is numpy's, and an engine computes its graph in torch.

The engine sees nothing but the addresses that were bound to its context, so weights that never arrived, a pool bound
twice, or a graph replayed on other memory show in the logits.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import json
import types

import numpy as np
import torch

from deepseek_trt.engines.sessions.tensorrt.device import Pinned
from deepseek_trt.export.bundle.graph import past_name, present_name
from deepseek_trt.export.bundle.narrow import SCALE
from deepseek_trt.export.bundle.widened import widened
from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.model import DeepseekV2
from deepseek_trt.plugins.aot.variants import KERNELS
from deepseek_trt.plugins.kernels.constants import sampling_constants
from deepseek_trt.plugins.kernels.launches import next_power_of_2

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "int32": np.int32, "int64": np.int64}


class FakeDevice:
    """Copies, marks and graphs run in order on a stream that is drained only by synchronize, read, write and wait."""

    name, stream = "a stand-in", 77

    def __init__(self, sm=86, room=2**31):
        self.sm, self.room = sm, room
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.queue, self.capturing = [], None
        self.calls: list[str] = []
        self.downloaded: list[int] = []  # bytes of each
        self.targets: list[str] = []  # what the loaded kernels were compiled for
        self.active = self.closed = False
        self.refuse_capture, self.refuse_kernels = "", "nothing"
        self._next = 1 << 20

    def _place(self, nbytes, shelf):
        address = self._next
        self._next += (nbytes + 511) // 256 * 256
        shelf[address] = np.full(nbytes, 0xAB, dtype=np.uint8)  # what lay there before
        return address

    def _bytes(self, address, nbytes, shelf):
        assert not self.closed
        for start, block in shelf.items():
            if start <= address and address + nbytes <= start + block.size:
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address} were never allocated")

    def _enqueue(self, name, work):
        assert self.active, "the context was never made current"
        self.calls.append(name)
        (self.queue if self.capturing is None else self.capturing).append(work)

    def run(self, work):
        self._enqueue("run", work)

    def bytes_from(self, address):
        """What was allocated from there on."""
        for start, block in self.memory.items():
            if start <= address < start + block.size:
                return block[address - start :]
        raise AssertionError(f"{address} was never allocated")

    def bytes_at(self, address, nbytes):
        return self._bytes(address, nbytes, self.memory)

    def activate(self):
        self.active = True

    def allocate(self, nbytes, what):
        if nbytes > self.room:
            raise BackendError(f"{self.name} has no room for {what}")
        self.room -= nbytes
        return self._place(nbytes, self.memory)

    def pin(self, nbytes):
        address = self._place(nbytes, self.pinned)
        return Pinned(address, self.pinned[address])

    def unpin(self, memory):
        self.pinned.pop(memory.address).fill(0xCD)

    def zero(self, address, nbytes):
        self._enqueue("zero", lambda: self.bytes_at(address, nbytes).fill(0))

    def upload(self, target, source, nbytes):
        to, of = self.bytes_at(target, nbytes), self._bytes(source, nbytes, self.pinned)
        self._enqueue("upload", lambda: to.__setitem__(slice(None), of))

    def download(self, target, source, nbytes):
        self.downloaded.append(nbytes)
        to, of = self._bytes(target, nbytes, self.pinned), self.bytes_at(source, nbytes)
        self._enqueue("download", lambda: to.__setitem__(slice(None), of))

    def copy(self, target, source, nbytes):
        to, of = self.bytes_at(target, nbytes), self.bytes_at(source, nbytes)
        self._enqueue("copy", lambda: to.__setitem__(slice(None), of))

    def read(self, source, array):
        self.synchronize()
        array.reshape(-1).view(np.uint8)[:] = self.bytes_at(source, array.nbytes)

    def write(self, target, array):
        self.synchronize()
        self.bytes_at(target, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def mark(self):
        return len(self.queue)

    def wait(self, mark):
        self.synchronize()

    def synchronize(self):
        assert self.capturing is None, "a stream that is captured must not be waited for"
        while self.queue:
            self.queue.pop(0)()

    def capture(self, work):
        self.calls.append("capture")
        if self.refuse_capture:
            raise BackendError(self.refuse_capture)
        self.capturing = []
        try:
            work()
            return tuple(self.capturing)
        finally:
            self.capturing = None

    def launch(self, graph):
        self.calls.append("launch")
        self.queue += graph

    def load_kernel(self, image, entry, shared_bytes):
        if self.refuse_kernels in image.decode():
            raise BackendError("the GPU refuses cuModuleLoadData: no kernel image is available")
        constants = json.loads(image)
        assert constants.pop("kernel") == entry
        self.targets.append(constants.pop("target"))
        return entry, constants

    def launch_kernel(self, kernel, grid, threads, shared_bytes, addresses):
        """Run it in Triton's interpreter, with each argument's memory from its address on."""
        assert all(address % 16 == 0 for address in addresses)
        (entry, constants), (function, dtypes) = kernel, sampling_kernel(kernel[0])
        blocks = zip([self.bytes_from(address) for address in addresses], dtypes, strict=True)
        given = [torch.from_numpy(block[: block.size // 8 * 8].view(dtype)) for block, dtype in blocks]
        self._enqueue(entry, lambda: function[grid](*given, **constants))

    def close(self):
        self.closed = True


def sampling_kernel(entry):
    """A kernel of the sampling by name, interpreted, and its arguments' dtypes."""
    from deepseek_trt.plugins.kernels import interpreter

    interpreter.enable()
    source = KERNELS[entry]
    module = importlib.import_module(f"deepseek_trt.plugins.kernels.{source.module}")
    kinds = {"*fp32": np.float32, "*fp64": np.float64, "*i32": np.int32, "*i64": np.int64}
    return getattr(module, entry), [kinds[argument.split()[1]] for argument in source.args.split(", ")]


def sampling_image(kernel, vocab):
    """What stands for the compiled kernel in a library: its name and constants."""
    constants, size = sampling_constants(vocab), next_power_of_2(vocab)
    sizes = {"sample_adjust": {**constants.adjust, "BLOCK": 16}, "sample_pick": {**constants.pick, "BLOCK": size}}
    return {"kernel": kernel, **sizes[kernel], **({"ROWS": 1} if kernel == "sample_pick" else {})}


def manifest_row(kernel, is_ptx, sm, offset, image):
    """What a library's manifest says of such an image."""
    constants = {name: size for name, size in json.loads(image).items() if name not in ("kernel", "target")}
    return {
        "op": "Sampling",
        "kernel": kernel,
        "sm": sm,
        "is_ptx": is_ptx,
        "entry": kernel,
        "shared_bytes": 256,
        "threads": 256,
        "offset": offset,
        "bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
        "constants": constants,
    }


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4


class Strategy(enum.Enum):
    STATIC, USER_MANAGED = range(2)


class Specialisation(enum.Enum):
    LAZY, EAGER = range(2)


class Cache:
    def __init__(self):
        self.blob = b"compiled"

    def deserialize(self, blob):
        self.blob = blob + b"+"
        return True

    def serialize(self):
        return self.blob


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = Specialisation.LAZY

    def __init__(self):
        self.strategy, self.cache = None, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class RtxRuntimeConfig(RuntimeConfig):
    def create_runtime_cache(self):
        return Cache()

    def set_runtime_cache(self, cache):
        self.cache = cache


class Context:
    """Reads and writes device memory through what was bound; runs the torch model.

    As with TensorRT, a capture must follow a run of the same shapes, and spoils what touches the context afterwards.
    """

    def __init__(self, trt, record, config):
        self.trt, self.record, self.config = trt, record, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = self.model = self.ran = None
        self.captured = False

    def is_stream_capturable(self, stream):
        return self.trt.capturable

    def set_device_memory(self, address, nbytes):
        assert address % 256 == 0
        self.memory = (address, nbytes)

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        assert not self.captured or self.addresses[name] == address, "the context of a captured graph was changed"
        self.addresses[name] = address
        return name in {t.name for t in (*self.record.inputs, *self.record.outputs)}

    def set_input_shape(self, name, shape):
        smallest, _, largest = self.record.profile.shapes[name]
        assert not self.captured or self.shapes[name] == shape, "the context of a captured graph was changed"
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    def execute_async_v3(self, stream):
        if self.trt.refuse_runs or (self.trt.refuse_captured_runs and self.trt.device.capturing is not None):
            self.trt.say("ERROR", "the first cause")
            self.trt.say("ERROR", "a consequence")
            return False
        assert stream == FakeDevice.stream
        assert self.memory is not None
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.trt.device.capturing is None:
            assert not self.captured, "the context of a captured graph ran"
            self.ran = shapes, addresses
        else:
            assert self.ran == (shapes, addresses), "captured without a run of the same shapes before"
            self.captured = True
        self.trt.device.run(lambda: self.compute(shapes, addresses))
        return True

    def in_one_piece(self, given, addresses):
        """The weights by name, parts of a stack of experts as the stack that they are in memory."""
        whole = {name: tensor for name, tensor in given.items() if ".part" not in name}
        for name in dict.fromkeys(name.partition(".part")[0] for name in given.keys() - whole.keys()):
            parts = [given[f"{name}.part{i}"] for i in range(sum(other.startswith(f"{name}.part") for other in given))]
            at = addresses[f"{name}.part0"]
            for i, part in enumerate(parts):
                assert addresses[f"{name}.part{i}"] == at, "parts must lie one after the other"
                at += part.numel() * part.element_size()
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            raw = self.trt.device.bytes_at(addresses[f"{name}.part0"], at - addresses[f"{name}.part0"])
            whole[name] = torch.from_numpy(raw.view(np.float32).reshape(shape))
        return whole

    def compute(self, shapes, addresses):
        given = {}
        for tensor in self.record.inputs:
            shape = shapes.get(tensor.name, tensor.dims)
            dtype = np.dtype(DTYPES[tensor.dtype])
            raw = self.trt.device.bytes_at(addresses[tensor.name], int(np.prod(shape)) * dtype.itemsize)
            given[tensor.name] = torch.from_numpy(raw.view(dtype).reshape(shape))
        shared = self.in_one_piece({name: given[name] for name in self.record.weights}, addresses)
        cache = self.trt.cache
        places = [(layer, pool.part) for layer in range(cache.layers) for pool in cache.pools]
        for place in places:
            assert addresses[past_name(*place)] == addresses[present_name(*place)], "the cache must be aliased"
        where = tuple(addresses[name] for name in self.record.weights)
        if self.model is None or self.model[0] != where:  # its parameters are the device's memory itself
            state = {**self.trt.constants, **shared}
            self.model = (where, self.trt.model_of(in_whole_numbers(state, self.trt.narrow)))
        model = self.model[1]
        model.model.cache_as(cache.narrow)
        pools = [given[past_name(*place)] for place in places]
        asked = ["input_ids", "sequence_lengths", "past_lengths", "page_table"]
        with torch.inference_mode():
            inputs = [given[name] for name in asked if name in given]
            logits, present = getattr(model, self.record.graph)(*inputs, pools)
        for pool, new in zip(pools, present, strict=True):
            pool.copy_(new)
        out = self.trt.device.bytes_at(addresses["logits"], logits.numel() * 4)
        out[:] = logits.numpy().reshape(-1).view(np.uint8)


def in_whole_numbers(state, narrow):
    """The model's weights, those in `narrow` widened from the codes and scales that were bound."""
    widened_ones = {}
    for name, of in narrow.items():
        codes = state[name].numpy()
        codes = codes if of.format == "int8" else codes.view(np.uint8)
        widened_ones[name] = torch.from_numpy(widened(codes, state[f"{name}{SCALE}"].numpy(), of))
    scales = {f"{name}{SCALE}" for name in narrow}
    return {name: tensor for name, tensor in (state | widened_ones).items() if name not in scales}


class Engine:
    device_memory_size_v2 = 4096

    def __init__(self, trt, record):
        self.trt, self.record = trt, record
        self.contexts = []

    def create_runtime_config(self):
        return (RtxRuntimeConfig if self.trt.rtx else RuntimeConfig)()

    def create_execution_context(self, config):
        self.trt.on_context()
        if self.contexts and self.trt.refuse_more_contexts:
            return None
        self.contexts.append(Context(self.trt, self.record, config))
        self.contexts[-1].engine = self
        self.trt.contexts[self.record.graph] = self.contexts[0]
        return self.contexts[-1]


def fake_trt(name, bundle, records, device, weights):
    """A module like tensorrt or tensorrt_rtx ("rtx" in its name), for plans whose bytes are their graph's name.

    `weights` are all of the bundle's, by name: what is not an input of a plan counts as being in it.
    """
    trt = types.ModuleType(name)
    trt.rtx, trt.device, trt.config = "rtx" in name, device, bundle.manifest.model
    trt.cache = bundle.manifest.cache
    trt.contexts, trt.refuse_runs, trt.validity = {}, False, (EngineValidity.VALID, 0)
    trt.deserialised = []
    trt.on_context = lambda: None
    trt.capturable, trt.refuse_captured_runs, trt.refuse_more_contexts = True, False, False
    trt.constants = weights
    recipes = [weight.recipe for weight in bundle.manifest.weights]
    trt.narrow = {recipe.name: recipe.narrow for recipe in recipes if recipe.narrow and not recipe.is_scales}
    trt.ExecutionContextAllocationStrategy = Strategy
    trt.DynamicShapesKernelSpecializationStrategy = Specialisation
    trt.EngineValidity, trt.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics

    class Runtime:
        def __init__(self, logger):
            trt.say = lambda severity, message: logger(severity, message)

        def deserialize_cuda_engine(self, data):
            trt.deserialised.append(bytes(data))
            record = records.get(bytes(data).decode())
            if record is None:
                trt.say("ERROR", "magicTag differs")
                return None
            return Engine(trt, record)

    class RtxRuntime(Runtime):
        def get_engine_validity(self, data):
            return trt.validity

    def model_of(state):
        with torch.device("meta"):
            model = DeepseekV2(bundle.manifest.model, bundle.manifest.all_logits)
        rope = type(model.model.rope)(bundle.manifest.model)
        model.load_state_dict(state, strict=True, assign=True)
        model.model.rope = rope
        return model.eval()

    trt.Runtime, trt.model_of = (RtxRuntime if trt.rtx else Runtime), model_of
    return trt
