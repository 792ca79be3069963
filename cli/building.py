"""What the build command does, with TensorRT's own progress on stderr."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from deepseek_trt.engines.plans.build import BuiltPlan, build_plans
from deepseek_trt.engines.plans.plan import BuildSpec
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.tensorrt.manifest import LIBRARY, PLUGINS_FOLDER, read_manifest


def build_with_progress(path: Path, spec: BuildSpec) -> tuple[BuiltPlan, ...]:
    """Build the bundle's plans; a library for these chips is built first where there is none yet."""
    _return_freed_memory()
    bundle = Bundle.open(path)
    library = path / PLUGINS_FOLDER / LIBRARY
    if not library.is_file() or not set(spec.sms) <= set(read_manifest(library).sms):
        from deepseek_trt.cli.plugins_run import make_library  # torch and the compilers

        library = make_library(path, spec.sms, fallback=True, cxx=None, jobs=2).path
    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, int] = {}

        def advance(phase: str, done: int, steps: int) -> None:
            task = tasks.get(phase)
            if task is None:
                task = tasks[phase] = bars.add_task(phase)
            bars.update(task, completed=done, total=steps, visible=done < steps)  # type: ignore[arg-type]

        return build_plans(bundle, spec, library, advance)


def _return_freed_memory() -> None:
    """Have glibc hand freed buffers back to the system: V2's engines then take 50 MB less at the peak.

    glibc raises its threshold to the largest block that was freed, and keeps what lies below it in the heap; a fixed
    threshold of 256 KiB keeps TensorRT's buffers out of the heap.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)


_M_MMAP_THRESHOLD = -3  # malloc.h
