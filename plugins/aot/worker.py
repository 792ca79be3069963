"""The process that compiles: reads pickled Requests from stdin, writes pickled Compiled, or errors, to stdout.

A process of its own (aot/compile.py starts `main` in a clean environment) because Triton reads its settings from the
environment, and because interpreting and compiling kernels exclude each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import pickle
import re
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

from deepseek_trt.plugins.aot.records import POINTER_ALIGNMENT, Binary, Variant
from deepseek_trt.plugins.aot.variants import KERNELS

PTX_VERSION = 80  # of the fallback: drivers from CUDA 12.0 on can compile it


@dataclass(frozen=True)
class Request:
    """Compile `variant` for `sm`; as_ptx: keep the PTX, for chips that are not known yet."""

    variant: Variant
    sm: int
    as_ptx: bool = False


@dataclass(frozen=True)
class Compiled:
    """A binary and what it costs: registers a thread, bytes spilled, bytes of scratch memory it would need.

    ttgir is Triton's last form before LLVM's, which says what waits for which load.
    """

    binary: Binary
    registers: int
    spill_bytes: int
    scratch_bytes: int
    ttgir: str


def compile_request(request: Request) -> Compiled:
    """Compile one variant; only in a process with Triton's interpreter off."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", request.sm, 32)
    triton.knobs.compilation.always_compile = True  # two ops' equal kernels: from its cache, ptxas would say nothing
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(_source(request.variant), target, _options(request.variant, request.as_ptx))
    meta = kernel.metadata
    image = kernel.asm["ptx"].encode() if request.as_ptx else kernel.asm["cubin"]
    binary = Binary(
        variant=request.variant,
        sm=request.sm,
        is_ptx=request.as_ptx,
        entry=meta.name,
        shared_bytes=meta.shared,
        threads=32 * meta.num_warps,
        image=image,
        sha256=hashlib.sha256(image).hexdigest(),
    )
    if meta.num_ctas != 1:
        raise AssertionError(f"{meta.name} wants clusters of {meta.num_ctas} blocks, which the launcher does not do")
    scratch = meta.global_scratch_size + meta.profile_scratch_size
    return Compiled(binary, *usage_from_log(log.getvalue()), scratch_bytes=scratch, ttgir=kernel.asm["ttgir"])


def usage_from_log(log: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from what `ptxas -v` says."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if registers is None or not spills:
        raise AssertionError(f"ptxas -v does not say what a kernel uses: {log!r}")
    return int(registers.group(1)), max(map(int, spills))


def _source(variant: Variant) -> Any:
    """The kernel with its arguments' types and its constants; all pointers are promised to be aligned."""
    from triton.compiler import ASTSource

    module = importlib.import_module(f"deepseek_trt.plugins.kernels.{KERNELS[variant.kernel].module}")
    function = getattr(module, variant.kernel)
    types = {arg.name: arg.type for arg in variant.args}
    constants = dict(variant.constexprs)
    names = function.arg_names
    if [*types] != [n for n in names if n not in constants] or sorted(constants) != sorted(set(names) - set(types)):
        raise AssertionError(
            f"{variant.kernel} takes {names}, but its variant gives {[*types]} and {sorted(constants)}"
        )
    return ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={
            (names.index(n),): [["tt.divisibility", POINTER_ALIGNMENT]] for n, kind in types.items() if kind[0] == "*"
        },
    )


def _options(variant: Variant, as_ptx: bool) -> dict[str, Any]:
    plain = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return {**plain, "ptx_version": PTX_VERSION} if as_ptx else plain


def _check_environment() -> None:
    """Refuse to compile where Triton does not use the pinned ptxas: it falls back to its own without a word."""
    from triton import knobs

    tools = {"TRITON_PTXAS_PATH": knobs.nvidia.ptxas, "TRITON_PTXAS_BLACKWELL_PATH": knobs.nvidia.ptxas_blackwell}
    for key, tool in tools.items():
        if tool.path != os.environ[key]:
            raise AssertionError(f"Triton uses {tool.path} instead of the pinned {os.environ[key]}: does that one run?")


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each pickled Request until the input ends: a Compiled, or the text of what went wrong."""
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        reply: Compiled | str
        try:
            reply = compile_request(request)
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        pickle.dump(reply, replies)
        replies.flush()


def main() -> None:
    """Serve on stdin and stdout; what Triton prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _check_environment()
    serve(sys.stdin.buffer, replies)
