"""From variants to binaries, ahead of time and with no GPU: cubins for known chips, and one PTX fallback.

Each of `jobs` compiler processes has a clean environment, a private cache folder that goes with it, and the ptxas of a
pinned wheel (Triton's own is newer than many drivers). Without line information the same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import pickle
import queue
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from deepseek_trt.export.bundle.graph import DEFAULT_PAGE_SIZE
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BuildError
from deepseek_trt.export.writing.working import scratch_folder
from deepseek_trt.plugins.aot.narrow_use import ALL_WHOLE, NarrowUse
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.aot.variants import variants_for
from deepseek_trt.plugins.aot.worker import Compiled, Request
from deepseek_trt.plugins.isolated import plain_environment, start_python
from deepseek_trt.plugins.kernels.chips import shared_limit

PTXAS_WHEEL = "nvidia-cuda-nvcc"
PTXAS_VERSION = "13.0.88"
FALLBACK_SM = 80  # what the PTX asks for: every chip from SM 80 on runs it
FALLBACK_TILES_SM = 86  # whose tiles it has: the smallest shared memory of all chips

Progress = Callable[[int, int], None]
Idle = queue.SimpleQueue[subprocess.Popen[bytes]]


def compile_all(
    config: ModelConfig,
    dtype: str,
    sms: Sequence[int],
    jobs: int = 1,
    on_progress: Progress | None = None,
    fallback: bool = True,
    page_size: int = DEFAULT_PAGE_SIZE,
    narrow: NarrowUse = ALL_WHOLE,
) -> tuple[Binary, ...]:
    """Compile all variants of `config` for all `sms`, in their order, then the PTX fallback: for pages of `page_size`
    tokens; `narrow` as variants_for.

    A variant that spills registers is compiled once more with twice its warps, which halves what a thread holds; the
    binary's variant says so. on_progress(done, total) is called after each, in the caller's thread. Raises BuildError
    where a variant spills even so, or does not fit a chip.
    """
    wanted = functools.partial(variants_for, config, dtype, page_size=page_size, narrow=narrow)
    requests = [Request(variant, sm) for sm in dict.fromkeys(sms) for variant in wanted(sm)]
    if fallback:
        small = wanted(FALLBACK_TILES_SM)
        requests += [Request(variant, FALLBACK_SM, as_ptx=True) for variant in small]
    return tuple(checked(c) for c in _compile_without_spills(requests, jobs, on_progress))


def _compile_without_spills(
    requests: Sequence[Request], jobs: int, on_progress: Progress | None = None
) -> tuple[Compiled, ...]:
    compiled = list(compile_requests(requests, jobs, on_progress))
    spilled = [i for i, c in enumerate(compiled) if _spills(c)]
    relaxed = [_with_twice_the_warps(requests[i]) for i in spilled]
    for i, again in zip(spilled, compile_requests(relaxed, jobs), strict=True):
        compiled[i] = again
    return tuple(compiled)


def _spills(compiled: Compiled) -> bool:
    """Whether it will spill where it runs; the driver allocates the registers of PTX anew, on a chip not known here."""
    return compiled.spill_bytes > 0 and not compiled.binary.is_ptx


def _with_twice_the_warps(request: Request) -> Request:
    return replace(request, variant=replace(request.variant, num_warps=2 * request.variant.num_warps))


def compile_requests(
    requests: Sequence[Request], jobs: int, on_progress: Progress | None = None
) -> tuple[Compiled, ...]:
    """Compile each request, unchecked, in order of `requests`, on `jobs` processes."""
    count = min(jobs, len(requests))
    with _compilers(count) as processes, ThreadPoolExecutor(max(1, count)) as pool:
        idle: Idle = queue.SimpleQueue()
        for process in processes:
            idle.put(process)
        futures = [pool.submit(_compile_on, idle, request) for request in requests]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()  # raises what went wrong at once
                if on_progress:
                    on_progress(done, len(requests))
        except BaseException:
            for process in processes:
                process.kill()  # else its kernel is awaited
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(future.result() for future in futures)


def _compile_on(idle: Idle, request: Request) -> Compiled:
    process = idle.get()
    try:
        return _ask(process, request)
    finally:
        idle.put(process)


def checked(compiled: Compiled) -> Binary:
    """The binary, when it runs on its chip as it should. Raises BuildError naming kernel, chip, tile and figure."""
    binary = compiled.binary
    limit = shared_limit(FALLBACK_TILES_SM if binary.is_ptx else binary.sm)
    if binary.shared_bytes > limit:
        raise _refusal(binary, f"needs {binary.shared_bytes} bytes of shared memory; a block has {limit}")
    if _spills(compiled):
        raise _refusal(binary, f"spills {compiled.spill_bytes} bytes a thread ({compiled.registers} registers)")
    if compiled.scratch_bytes:
        raise _refusal(binary, f"wants {compiled.scratch_bytes} bytes of scratch memory, which the launcher has not")
    return binary


def _refusal(binary: Binary, what: str) -> BuildError:
    variant = binary.variant
    sizes = ", ".join(f"{name} {size}" for name, size in variant.constexprs)
    return BuildError(
        f"{variant.kernel} in {variant.dtype} for SM {binary.sm} {what}, with {sizes}, {variant.num_warps} warps and "
        f"{variant.num_stages} stages: give that chip a smaller tile in plugins/kernels/tiles.py"
    )


def find_ptxas() -> Path:
    """The ptxas of the pinned wheel. Raises BuildError where it, or Triton, is not installed."""
    mend = f"pip install {PTXAS_WHEEL}=={PTXAS_VERSION}"
    if importlib.util.find_spec("triton") is None:
        raise BuildError("compiling the kernels needs Triton, which is not installed: pip install triton==3.7.1")
    try:
        files = importlib.metadata.files(PTXAS_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise BuildError(f"compiling the kernels needs ptxas, which is not installed: {mend}") from None
    paths = [Path(str(file.locate())) for file in files if file.name == "ptxas"]
    if not paths or not os.access(paths[0], os.X_OK):
        raise BuildError(f"{PTXAS_WHEEL} is installed, but without a ptxas that can be run: {mend} --force-reinstall")
    return paths[0]


def _environment(ptxas: Path, cache: Path) -> dict[str, str]:
    """A compiler process's environment: this one's without any of Triton's settings, then those we want."""
    settings = ("TRITON_", "PTXAS_", "DISABLE_PTXAS")
    kept = {key: value for key, value in plain_environment().items() if not key.startswith(settings)}
    return {
        **kept,
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_PTXAS_PATH": str(ptxas),
        "TRITON_PTXAS_BLACKWELL_PATH": str(ptxas),
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",  # registers and spills
    }


@contextlib.contextmanager
def _compilers(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`count` compiler processes, ended and their caches removed afterwards."""
    with scratch_folder() as folder, contextlib.ExitStack() as stack:
        processes = []
        for index in range(count):
            cache = folder / str(index)
            cache.mkdir()
            process = start_python("deepseek_trt.plugins.aot.worker", _environment(find_ptxas(), cache), cache)
            processes.append(stack.enter_context(process))  # whose end is awaited there
            stack.callback(process.kill)
        yield processes


def _ask(process: subprocess.Popen[bytes], request: Request) -> Compiled:
    """One request, one reply. Raises BuildError with the compiler's words when it fails."""
    assert process.stdin is not None
    assert process.stdout is not None
    what = f"{request.variant.kernel} in {request.variant.dtype} for SM {request.sm}"
    try:
        pickle.dump(request, process.stdin)
        process.stdin.flush()
        reply = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError):
        raise BuildError(f"the compiler process died at {what}; its last words are on stderr") from None
    if isinstance(reply, str):
        raise BuildError(f"{what} does not compile: {reply}")
    assert isinstance(reply, Compiled)
    return reply
