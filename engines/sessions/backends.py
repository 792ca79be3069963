"""Backends by name: how each makes a Session of a bundle. Heavy libraries are imported by the one that is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.folder import Bundle


@dataclass(frozen=True)
class SessionRequest:
    """pages counts the scratch page; threads 0 lets the backend choose.

    device ("cpu" or "cuda") and mapped (on the CPU, weights stay in their file; None: where memory is short) are for
    the ort backend; cuda_graphs and progress (bytes of weights on the GPU, bytes in all) are for the tensorrt backend.
    """

    bundle: Bundle
    pages: int
    threads: int = 0
    device: str = "cpu"
    mapped: bool | None = None
    cuda_graphs: bool = True
    progress: Callable[[int, int], None] | None = None


def _ort(request: SessionRequest) -> Session:
    if request.device == "cuda":
        from deepseek_trt.engines.sessions.ort_cuda import OrtCudaSession

        return OrtCudaSession(request.bundle, request.pages, request.threads)
    from deepseek_trt.engines.sessions.ort import OrtSession

    return OrtSession(request.bundle, request.pages, request.threads, mapped=request.mapped)


def _torch(request: SessionRequest) -> Session:
    import torch

    from deepseek_trt.engines.sessions.torch import TorchSession

    if request.threads:
        torch.set_num_threads(request.threads)
    return TorchSession(request.bundle, request.pages)


def _tensorrt(request: SessionRequest) -> Session:
    from deepseek_trt.engines.sessions.tensorrt.session import TrtSession

    return TrtSession(request.bundle, request.pages, cuda_graphs=request.cuda_graphs, progress=request.progress)


BACKENDS: dict[str, Callable[[SessionRequest], Session]] = {"ort": _ort, "torch": _torch, "tensorrt": _tensorrt}
