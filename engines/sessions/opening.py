"""Opening: the backends by name, which of them runs a bundle here, and why: asked of bundle, GPU and ONNX Runtime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_trt.engines.plans.plan import has_plan
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.engines.sessions.tensorrt.cuda import visible_gpu
from deepseek_trt.engines.sessions.threads import check_threads
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.proof import no_progress
from deepseek_trt.export.errors import BackendError, BundleError, RequestError

AUTO, CUDA_PROVIDER = "auto", "CUDAExecutionProvider"


@dataclass(frozen=True)
class SessionRequest:
    """pages counts the scratch page; threads 0 lets the backend choose.

    mapped (weights stay in their file; None: where memory is short) is for the ort backend, cuda_graphs for tensorrt;
    both tell progress (bytes of weights that are where they are wanted, bytes in all).
    """

    bundle: Bundle
    pages: int
    threads: int = 0
    mapped: bool | None = None
    cuda_graphs: bool = True
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Raises RequestError for threads that nobody can start."""
        check_threads(self.threads)


def _ort(request: SessionRequest) -> Session:
    from deepseek_trt.engines.sessions.ort import OrtSession

    progress = request.progress or no_progress
    return OrtSession(request.bundle, request.pages, request.threads, mapped=request.mapped, progress=progress)


def _ort_cuda(request: SessionRequest) -> Session:
    from deepseek_trt.engines.sessions.ort import OrtCudaSession

    return OrtCudaSession(request.bundle, request.pages, request.threads)


def _torch(request: SessionRequest) -> Session:
    import torch

    from deepseek_trt.engines.sessions.torch import TorchSession

    if request.threads:
        torch.set_num_threads(request.threads)
    return TorchSession(request.bundle, request.pages)


def _tensorrt(request: SessionRequest) -> Session:
    from deepseek_trt.engines.sessions.tensorrt.session import TrtSession

    return TrtSession(request.bundle, request.pages, cuda_graphs=request.cuda_graphs, progress=request.progress)


# How each makes a Session of a bundle. Heavy libraries are imported by the one that is chosen.
BACKENDS: dict[str, Callable[[SessionRequest], Session]] = {
    "ort": _ort,
    "ort-cuda": _ort_cuda,
    "torch": _torch,
    "tensorrt": _tensorrt,
}
CHOICES = (AUTO, *BACKENDS)


@dataclass(frozen=True)
class Choice:
    """A backend by name, and why it was chosen."""

    backend: str
    why: str

    @property
    def device(self) -> str:
        """What it computes on, "cpu" or "cuda"."""
        return "cuda" if self.backend in ("ort-cuda", "tensorrt") else "cpu"


@dataclass(frozen=True)
class Opened:
    """A session and the choice that led to it."""

    session: Session
    choice: Choice

    @property
    def line(self) -> str:
        """For people, e.g. "backend: ort (bfloat16 weights, computed in float32), as no GPU is visible"."""
        note = f" ({self.session.note})" if self.session.note else ""
        return f"backend: {self.session.backend}{note}, as {self.choice.why}"


@dataclass(frozen=True)
class Surroundings:
    """What a choice depends on beside the bundle; tests give others."""

    gpu: Callable[[], str | None] = visible_gpu
    ort_providers: Callable[[], list[str]] = lambda: importlib.import_module("onnxruntime").get_available_providers()


def check_generates(bundle: Bundle) -> None:
    """BundleError where the bundle's graphs do not give the next token's logits from token ids."""
    why_not = bundle.manifest.generation_refusal
    if why_not:
        raise BundleError(f"{bundle.path} cannot generate text: {why_not}")


def check_backend(wanted: str) -> None:
    """RequestError for a backend that there is not."""
    if wanted not in CHOICES:
        raise RequestError(f"backend {wanted!r}: must be one of {', '.join(CHOICES)}")


def choose_backend(bundle: Bundle, wanted: str = AUTO, around: Surroundings | None = None) -> Choice:
    """The backend `wanted`, or the fastest that this machine and the bundle allow; RequestError for an unknown one.

    "ort" is ONNX Runtime on the GPU where there is one that it can use.
    """
    check_backend(wanted)
    if wanted not in (AUTO, "ort"):
        return Choice(wanted, "it was asked for")
    around = around or Surroundings()
    gpu = around.gpu()
    if gpu is None:
        return Choice("ort", "no GPU is visible")
    missing = [f"{graph.name}.plan" for graph in bundle.manifest.graphs if not has_plan(bundle, graph.name)]
    if wanted == AUTO and not missing:
        return Choice("tensorrt", f"the bundle has plans and {gpu} is visible")
    unplanned = f" and the bundle has no {missing[0]}" if wanted == AUTO else ""
    if CUDA_PROVIDER in around.ort_providers():
        return Choice("ort-cuda", f"{gpu} is visible{unplanned}")
    return Choice("ort", f"this ONNX Runtime has no {CUDA_PROVIDER}{unplanned}")


def open_session(request: SessionRequest, wanted: str = AUTO, around: Surroundings | None = None) -> Opened:
    """A session of the backend that `choose_backend` gives.

    ONNX Runtime lists its CUDA provider without knowing whether CUDA's libraries are there: where it does not start and
    was not asked for by name, the CPU takes over and the choice says so.
    """
    choice = choose_backend(request.bundle, wanted, around)
    request.bundle.prove_weights(request.progress or no_progress)
    try:
        return Opened(BACKENDS[choice.backend](request), choice)
    except BackendError as error:
        if choice.backend != "ort-cuda" or wanted == "ort-cuda":
            raise
        return Opened(_ort(request), Choice("ort", f"the GPU cannot be used: {error}"))
