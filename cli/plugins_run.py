"""What the plugins command does, with its progress on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.plugins.aot.compile import compile_all
from deepseek_trt.plugins.aot.records import Binary
from deepseek_trt.plugins.tensorrt.library import PluginLibrary, build_library
from deepseek_trt.plugins.tensorrt.manifest import PLUGINS_FOLDER


def make_library(path: Path, sms: Sequence[int], fallback: bool, cxx: str | None, jobs: int) -> PluginLibrary:
    """Compile all kernels of the bundle for `sms` and build its library."""
    bundle = Bundle.open(path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("compiling kernels", total=None)

        def advance(done: int, total: int, binary: Binary) -> None:
            bars.update(task, completed=done, total=total)

        model, dtype = bundle.manifest.model, bundle.manifest.dtype
        binaries = compile_all(model, dtype, sms, jobs=jobs, on_progress=advance, fallback=fallback)
    return build_library(
        binaries, model, dtype, path / PLUGINS_FOLDER, cxx=cxx, progress=lambda text: click.echo(text, err=True)
    )
