"""Engine: one plan in TensorRT's hands, with an execution context. All memory that it works on is the caller's."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable
from typing import Any, BinaryIO

from deepseek_trt.engines.plans.check import AGAIN, is_for_chip, wrong_chip
from deepseek_trt.engines.plans.flavour import Flavour
from deepseek_trt.engines.plans.plan import Plan
from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.trust.cache import keep_bytes, kept_bytes

KEPT = "tensorrt"  # the part of the user's cache


class Engine:
    """A deserialised plan. Bind and shape everything, then enqueue; activation memory first."""

    def __init__(self, plan: Plan, stream: BinaryIO, flavour: Flavour, sm: int, gpu: str, specialise: bool) -> None:
        """`stream` is the open plan. `specialise`: compile for each new shape before it first runs, where the flavour
        compiles at run time.

        Raises BackendError with TensorRT's own words where it does not take the plan.
        """
        self.note = ""
        self._plan, self._flavour = plan, flavour
        flavour.log.errors.clear()
        runtime = flavour.trt.Runtime(flavour.logger)
        if plan.record.spec.embed_plugins:
            runtime.engine_host_code_allowed = True
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._check_valid(runtime, data, sm, gpu)
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(f"{flavour.name} does not take {plan.path} ({flavour.log.first()}): {AGAIN}")
        self._runtime: Any = runtime
        self._engine: Any = engine
        self._cache: Any = None
        self._config = self._make_config(specialise)
        self._context: Any = self._new_context()
        self._memory: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def twin(self) -> Engine:
        """The same plan with a context of its own, which has all that was bound and shaped so far, and this memory.

        Raises BackendError where TensorRT gives no other context.
        """
        other = copy.copy(self)
        other._context = self._new_context()
        other._addresses, other._shapes = {}, {}
        if self._memory is not None:
            other.use_memory(*self._memory)
        for name, address in self._addresses.items():
            other.bind(name, address)
        for name, shape in self._shapes.items():
            other.shape(name, shape)
        return other

    @property
    def activation_bytes(self) -> int:
        """Working memory of one run, for the largest shapes."""
        return int(self._engine.device_memory_size_v2)

    @property
    def cache_name(self) -> str:
        """Under which kernels compiled at run time are kept in the user's cache, where the flavour does that."""
        return f"{self._plan.record.plan_sha256[:32]}.runtime-cache"

    def use_memory(self, address: int, nbytes: int) -> None:
        """Activation memory; runs of other engines may use it in between."""
        self._memory = address, nbytes
        self._context.set_device_memory(address, nbytes)

    def bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._refusal(f"binding {name}")
        self._addresses[name] = address

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise self._refusal(f"{name} of shape {list(shape)}")
        self._shapes[name] = shape

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise self._refusal("the run")

    def can_be_captured(self, stream: int) -> bool:
        """Whether CUDA may record a run now; a flavour that is not asked is taken to."""
        ask: Callable[[int], bool] | None = getattr(self._context, "is_stream_capturable", None)
        return ask is None or ask(stream)

    def close(self) -> None:
        """Save what was compiled, and let go of the engine while its GPU is still there."""
        self.save_cache()
        self._cache = self._config = self._context = self._engine = self._runtime = None

    def save_cache(self) -> None:
        """Keep the runtime cache, where there is one and the user's cache can be written."""
        blob = bytes(self._cache.serialize()) if self._cache is not None else b""
        if blob and kept_bytes(KEPT, self.cache_name) != blob:
            keep_bytes(KEPT, self.cache_name, blob)

    def _check_valid(self, runtime: Any, data: mmap.mmap, sm: int, gpu: str) -> None:
        """Ask the runtime, where it can tell, whether it takes the plan on this GPU; else go by the record."""
        listed = is_for_chip(self._plan, sm)
        if not hasattr(runtime, "get_engine_validity"):
            if not listed:
                raise wrong_chip(self._plan, sm, gpu)
            return
        validity, bits = runtime.get_engine_validity(data)
        reasons = self._reasons(bits)
        if validity == self._flavour.trt.EngineValidity.INVALID:
            if not listed:
                raise wrong_chip(self._plan, sm, gpu)
            words = ", ".join(reasons) or self._flavour.log.first()
            raise BackendError(f"{self._flavour.name} does not take {self._plan.path} on {gpu} ({words}): {AGAIN}")
        if validity != self._flavour.trt.EngineValidity.VALID or not listed:
            built = ", ".join(map(str, self._plan.record.spec.sms))
            why = f" ({', '.join(reasons)})" if reasons else ""
            self.note = f"built for SM {built}, runs on SM {sm}, maybe slower{why}"

    def _reasons(self, bits: int) -> list[str]:
        """The names of the diagnostics that are set."""
        known = self._flavour.trt.EngineInvalidityDiagnostics.__members__
        return [name for name, value in known.items() if int(value) & int(bits)]

    def _make_config(self, specialise: bool) -> Any:
        """What contexts are made from: a runtime config, or where there is none the strategy of allocation."""
        trt = self._flavour.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._use_cache(config)
        if specialise and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        return config

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self._refusal("an execution context")
        return context

    def _use_cache(self, config: Any) -> None:
        """Start from what earlier processes compiled; TensorRT leaves a cache of another GPU, driver or version be."""
        if not hasattr(config, "create_runtime_cache"):
            return
        self._cache = config.create_runtime_cache()
        kept = kept_bytes(KEPT, self.cache_name)
        if kept is not None:
            self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)

    def _refusal(self, what: str) -> BackendError:
        name = f"{self._flavour.name} {self._flavour.version}"
        return BackendError(f"{name} refuses {what} with {self._plan.path.name}: {self._flavour.log.first()}")
