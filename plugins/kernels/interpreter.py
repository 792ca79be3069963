"""Triton's interpreter, turned on and mended: the kernels on a CPU, for tests and for validation without a GPU.

Whether a kernel is compiled or interpreted is settled when it is decorated, so `enable` must come before the first
import of a kernel's module. It then holds for the rest of the process.

The interpreter says nothing of races, of shared memory or of registers; it shows that the arithmetic is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_trt.export.errors import BackendError

KERNEL_MODULES = (
    "bounds",
    "order",
    "latent_write",
    "mla_schedule",
    "mla_decode",
    "mla_prefill",
    "moe_router",
    "moe_biased_router",
    "moe_dispatch",
    "moe_experts",
    "sampling.passes",
    "sampling.adjust",
    "sampling.pick",
    "absorbed.query",
    "absorbed.value",
    "moe.logits",
    "moe.choose",
    "moe.experts",
    "moe.layer",
    "narrow.codes",
    "narrow.linear",
    "narrow.experts",
    "cache.codes",
    "cache.attend",
    "cache.expand",
    "cache.write",
    "cache.decode",
    "cache.prefill",
)

_enabled = False


def enable() -> None:
    """Have all kernels interpreted from now on. Raises BackendError when a kernel's module was imported before."""
    global _enabled
    if _enabled:
        return
    loaded = [name for name in KERNEL_MODULES if f"{__package__}.{name}" in sys.modules]
    if loaded:
        raise BackendError(
            f"too late to interpret kernels: imported already, to be compiled for a GPU: {', '.join(loaded)}; "
            "call interpreter.enable() before the first kernel is called, in a fresh process"
        )
    import triton
    from triton.runtime import interpreter as stock

    triton.knobs.runtime.interpret = True
    _interpret_library()
    for name, repaired in _repairs(stock.InterpreterBuilder, stock.TensorHandle, triton.language).items():
        setattr(stock.InterpreterBuilder, name, repaired)
    _enabled = True


def require() -> None:
    """Raise BackendError unless kernels are interpreted."""
    if not _enabled:
        raise BackendError(
            "the kernels were given CPU tensors, but they are compiled for a GPU in this process: "
            "call deepseek_trt.plugins.kernels.interpreter.enable() before the first kernel is called"
        )


def _interpret_library() -> None:
    """Triton's own functions (tl.max, tl.zeros) too, where they were imported for compilation already."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    twins: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("triton.language"):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, key, twins.setdefault(id(value), InterpretedFunction(value.fn)))


def floats_from_bf16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The float32 values of bfloat16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def bf16_from_floats(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    out: np.ndarray[Any, Any] = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return out


def _repairs(builder: Any, handle: Any, tl: Any) -> dict[str, Callable[..., Any]]:
    """Methods for the interpreter's builder.

    The stock one keeps bfloat16 as uint16 and does arithmetic on the bit patterns, and it truncates where it converts
    from float32 (triton 3.6 to 3.9). Its fused multiply-add rounds twice. Also, numpy's warnings of inf - inf and
    overflow are silenced, as on a GPU.
    """
    stock = {name: getattr(builder, name) for name in ("create_dot", "binary_op", "unary_op", "cast_impl")}
    stock_fp_to_fp, stock_fma = builder.create_fp_to_fp, builder.create_fma

    def is_bf16(x: Any) -> bool:
        return bool(x.dtype.scalar == tl.bfloat16)

    def widened(x: Any) -> Any:
        return handle(floats_from_bf16(x.data), tl.float32) if is_bf16(x) else x

    def narrowed(x: Any) -> Any:
        return handle(bf16_from_floats(x.data), tl.bfloat16) if x.dtype.scalar == tl.float32 else x

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        # float16 operands too: numpy has no fast product for them, and the product of two is exact in float32
        wide = (handle(x.data.astype(np.float32), tl.float32) for x in (widened(a), widened(b)))
        return stock["create_dot"](self, *wide, acc, *options)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        with np.errstate(all="ignore"):
            out = stock["binary_op"](self, widened(lhs), widened(rhs), op)
        return narrowed(out) if is_bf16(lhs) and is_bf16(rhs) else out

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        with np.errstate(all="ignore"):
            out = stock["unary_op"](self, widened(x), op)
        return narrowed(out) if is_bf16(x) else out

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            return narrowed(x)
        return stock["cast_impl"](self, widened(x), dtype)

    def create_fp_to_fp(self: Any, x: Any, dtype: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (dtype.scalar, x.dtype.scalar):
            return cast_impl(self, x, dtype)
        return stock_fp_to_fp(self, x, dtype, rounding)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            return stock_fma(self, x, y, z)
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return handle(wide.astype(np.float32), tl.float32)

    def create_cast(self: Any, x: Any, dtype: Any) -> Any:
        return self.cast_impl(x, dtype)

    casts = dict.fromkeys(("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"), create_cast)
    return {
        "create_dot": create_dot,
        "binary_op": binary_op,
        "unary_op": unary_op,
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_fma": create_fma,
        **casts,
    }
