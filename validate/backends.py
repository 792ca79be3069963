"""Backends that can be validated: how each makes its Session, and how it is watched, if it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_trt.engines.backends import SessionRequest
from deepseek_trt.engines.session import Session
from deepseek_trt.export.errors import BackendError
from deepseek_trt.validate.probes import Probes, Watcher

Make = Callable[[SessionRequest], Session]
Watch = Callable[[SessionRequest, Probes], Watcher]


@dataclass(frozen=True)
class Backend:
    """`watch` is None where inner values cannot be seen: then near-tie router choices cannot be followed."""

    make: Make
    watch: Watch | None = None


def make_reference(request: SessionRequest) -> Session:
    """Torch in float32."""
    return _torch(request, "float32")


def _torch(request: SessionRequest, dtype: str | None = None) -> Session:
    """Torch, in the bundle's dtype unless told otherwise."""
    import torch

    from deepseek_trt.validate.torch_backend import torch_session

    if request.threads:
        torch.set_num_threads(request.threads)
    return torch_session(request.bundle, request.pages, dtype or request.bundle.manifest.dtype)


def _kernels(request: SessionRequest) -> Session:
    from deepseek_trt.validate.kernel_backend import KernelSession

    return KernelSession(request.bundle, request.pages)


def _engine(name: str) -> Make:
    """A backend of the engines."""

    def make(request: SessionRequest) -> Session:
        from deepseek_trt.engines.backends import BACKENDS as ENGINES

        if name not in ENGINES:
            raise BackendError(f"backend {name} is not in this build; it has: {', '.join(ENGINES)}")
        return ENGINES[name](request)

    return make


def _watch_torch(request: SessionRequest, probes: Probes) -> Watcher:
    from deepseek_trt.validate.torch_watch import TorchWatcher

    return TorchWatcher(probes)


def _watch_ort(request: SessionRequest, probes: Probes) -> Watcher:
    from deepseek_trt.validate.ort_watch import OrtWatcher

    return OrtWatcher(request, probes)


def _transformers(request: SessionRequest) -> Session:
    from deepseek_trt.validate.transformers_session import TransformersSession

    return TransformersSession(request)


BACKENDS: dict[str, Backend] = {
    "ort": Backend(_engine("ort"), _watch_ort),
    "torch": Backend(_torch, _watch_torch),
    "transformers": Backend(_transformers),
    "kernels": Backend(_kernels, _watch_torch),
    "tensorrt": Backend(_engine("tensorrt")),
}
