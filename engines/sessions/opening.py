"""Which backend runs a bundle here, and why: asked of the bundle, the GPU and ONNX Runtime, in this order."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_trt.engines.sessions.backends import BACKENDS, SessionRequest
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.engines.sessions.tensorrt.device import visible_gpu
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import BackendError, RequestError

AUTO = "auto"
CHOICES = (AUTO, *BACKENDS)
CUDA_PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Choice:
    """A backend by name, the device that it computes on ("cpu" or "cuda"), and why it was chosen."""

    backend: str
    device: str
    why: str


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
    ort_providers: Callable[[], list[str]] = lambda: list(
        importlib.import_module("onnxruntime").get_available_providers()
    )


def choose_backend(bundle: Bundle, wanted: str = AUTO, around: Surroundings | None = None) -> Choice:
    """The backend `wanted`, or the fastest that this machine and the bundle allow; RequestError for an unknown one."""
    around = around or Surroundings()
    if wanted not in CHOICES:
        raise RequestError(f"backend {wanted!r}: must be one of {', '.join(CHOICES)}")
    if wanted in ("torch", "tensorrt"):
        return Choice(wanted, "cuda" if wanted == "tensorrt" else "cpu", "it was asked for")
    gpu = around.gpu()
    if gpu is None:
        return Choice("ort", "cpu", "no GPU is visible")
    missing = [f"{graph.name}.plan" for graph in bundle.manifest.graphs if not _plan(bundle, graph.name)]
    if wanted == AUTO and not missing:
        return Choice("tensorrt", "cuda", f"the bundle has plans and {gpu} is visible")
    unplanned = f" and the bundle has no {missing[0]}" if wanted == AUTO else ""
    if CUDA_PROVIDER in around.ort_providers():
        return Choice("ort", "cuda", f"{gpu} is visible{unplanned}")
    return Choice("ort", "cpu", f"this ONNX Runtime has no {CUDA_PROVIDER}{unplanned}")


def open_session(request: SessionRequest, wanted: str = AUTO, around: Surroundings | None = None) -> Opened:
    """A session of the backend that `choose_backend` gives.

    ONNX Runtime lists its CUDA provider without knowing whether CUDA's libraries are there: where it does not start,
    the CPU takes over and the choice says so.
    """
    choice = choose_backend(request.bundle, wanted, around)
    make = BACKENDS[choice.backend]
    if (choice.backend, choice.device) != ("ort", "cuda"):
        return Opened(make(request), choice)
    try:
        return Opened(make(dataclasses.replace(request, device="cuda")), choice)
    except BackendError as error:
        choice = Choice("ort", "cpu", f"the GPU cannot be used: {error}")
        return Opened(make(request), choice)


def _plan(bundle: Bundle, graph: str) -> bool:
    return (bundle.path / f"{graph}.plan").is_file()
