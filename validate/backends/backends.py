"""Backends that can be validated: how each makes its Session, and how it is watched, if it can be.

"exported" runs the graphs as exported; "ort" is ONNX Runtime as everything else here runs it, decode through the
compiled CPU operators.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deepseek_trt.engines.plans.check import check_version, read_plans
from deepseek_trt.engines.plans.flavour import open_flavour
from deepseek_trt.engines.sessions.opening import BACKENDS as ENGINES
from deepseek_trt.engines.sessions.opening import SessionRequest
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.engines.sessions.tensorrt.cuda import open_device
from deepseek_trt.engines.sessions.torch import TorchSession, Weights
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError, DeepseekTrtError
from deepseek_trt.validate.backends.exported import ExportedSession, OrtWatcher
from deepseek_trt.validate.backends.probes import Probes, Watcher
from deepseek_trt.validate.backends.torch import torch_session
from deepseek_trt.validate.backends.torch_watch import TorchWatcher
from deepseek_trt.validate.backends.transformers import TransformersSession, comparable_checkpoint

Make = Callable[[SessionRequest], Session]


@dataclass(frozen=True)
class Backend:
    """`watch` is None where inner values cannot be seen: then near-tie router choices cannot be followed.

    A slow one takes seconds a step, and is spared the long cases. `check` raises a DeepseekTrtError where it
    cannot run the bundle here, before anything else has run.
    """

    make: Make
    watch: Callable[[Probes], Watcher] | None = None
    is_slow: bool = False
    check: Callable[[Bundle], object] = lambda bundle: None


def make_reference(request: SessionRequest, weights: Weights | None = None, whole_cache: bool = False) -> TorchSession:
    """Torch in float32, with the bundle's weights or those given."""
    return _torch(request, "float32", weights, whole_cache)


def _torch(
    request: SessionRequest, dtype: str | None = None, weights: Weights | None = None, whole_cache: bool = False
) -> TorchSession:
    """Torch, in the bundle's dtype unless told otherwise."""
    if request.threads:
        torch.set_num_threads(request.threads)
    dtype = dtype or request.bundle.manifest.dtype
    return torch_session(request.bundle, request.pages, dtype, weights, whole_cache)


def _kernels(request: SessionRequest) -> Session:
    from deepseek_trt.validate.backends.kernels import KernelSession  # its import changes what torch runs

    return KernelSession(request.bundle, request.pages)


def _check_transformers(bundle: Bundle) -> None:
    if bundle.manifest.is_narrow:
        raise BackendError("the bundle has narrow weights, which it does not take: leave it out")
    if bundle.manifest.cache.narrow is not None:
        raise BackendError("the bundle has a narrow cache, which it does not take: leave it out")
    comparable_checkpoint(bundle)


def _check_kernels(bundle: Bundle) -> None:
    if importlib.util.find_spec("triton") is None:
        raise BackendError("backend kernels needs Triton's interpreter, and it is not installed: pip install triton")


def _check_tensorrt(bundle: Bundle) -> None:
    """The plans, the TensorRT that built them, and a GPU."""
    plans = read_plans(bundle)
    for plan in plans.values():
        check_version(plan, open_flavour(plan.record.spec.flavour))
    open_device().close()


BACKENDS: dict[str, Backend] = {
    "exported": Backend(ExportedSession, OrtWatcher),
    "ort": Backend(ENGINES["ort"]),
    "torch": Backend(_torch, TorchWatcher),
    "transformers": Backend(TransformersSession, is_slow=True, check=_check_transformers),
    "kernels": Backend(_kernels, TorchWatcher, is_slow=True, check=_check_kernels),
    "tensorrt": Backend(ENGINES["tensorrt"], check=_check_tensorrt),
}


def check_backend(name: str, bundle: Bundle) -> None:
    """Raise the error of the backend's `check`, with the backend's name."""
    try:
        BACKENDS[name].check(bundle)
    except DeepseekTrtError as error:
        raise type(error)(f"backend {name} cannot run here: {error}") from None
