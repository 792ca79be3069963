"""The torch session with every custom op evaluated by its Triton kernel: in Triton's interpreter, so with no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.arrays import Arrays, Floats
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.ops import OPS
from deepseek_trt.export.ops.spec import OpSpec
from deepseek_trt.export.ops.torch_ops import TORCH_OPS
from deepseek_trt.plugins.kernels import KERNEL_OPS, interpreter

_kernels_run: ContextVar[bool] = ContextVar("kernels_run", default=False)


def _either(spec: OpSpec) -> Callable[..., Any]:
    """The op's kernel inside `_kernels`, its reference elsewhere."""

    def run(*args: Any) -> Any:
        return (KERNEL_OPS[spec.name] if _kernels_run.get() else spec.reference)(*args)

    return run


for _spec in OPS:
    if _spec.name in KERNEL_OPS:
        TORCH_OPS[_spec.name].register_kernel("cpu", _either(_spec))


@contextmanager
def _kernels() -> Iterator[None]:
    token = _kernels_run.set(True)
    try:
        yield
    finally:
        _kernels_run.reset(token)


class KernelSession(TorchSession):
    """Computes in the bundle's dtype: what the plugins compute on a GPU, op by op."""

    backend = "kernels"

    def __init__(self, bundle: Bundle, pages: int) -> None:
        interpreter.enable()
        super().__init__(bundle, pages, bundle.manifest.dtype)
        self.note = f"custom ops by their Triton kernels in the interpreter, in {bundle.manifest.dtype}"

    def compute(self, graph: str, feeds: Arrays) -> Floats:
        with _kernels():
            return super().compute(graph, feeds)
