"""Progress on stderr: a line a step, and bars that appear with the first number and go away at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from deepseek_trt.cli.printing.output import is_quiet, step
from deepseek_trt.export.text.wording import escaped, sentence

if TYPE_CHECKING:
    from deepseek_trt.export.exporter import Reporter
    from deepseek_trt.plugins.tensorrt.for_bundle import PluginReporter

_NAME = TextColumn("{task.description}", markup=False)


def _console(**options: bool) -> Console:
    """Stderr, or nothing where --quiet was given."""
    return Console(stderr=True, quiet=is_quiet(), markup=False, emoji=False, **options)  # type: ignore[arg-type]


@contextmanager
def export_reporter() -> Iterator[Reporter]:
    """Give an export's Reporter: steps as lines, bytes as bars."""
    from deepseek_trt.export.exporter import Reporter

    columns = (_NAME, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = _console()
    with Progress(*columns, console=console) as bars:
        current = [bars.add_task("", visible=False, total=None)]

        def begin(text: str, total: int | None) -> None:
            step(text, shown=False)
            bars.stop_task(current[0])
            if total is None:
                console.print(sentence(text))
            current[0] = bars.add_task(escaped(text), visible=total is not None, total=total)

        yield Reporter(begin, lambda done: bars.advance(current[0], done))


@contextmanager
def plugin_reporter() -> Iterator[PluginReporter]:
    """Give the plugin library's reporter: a bar of kernels, and lines."""
    from deepseek_trt.plugins.tensorrt.for_bundle import PluginReporter

    with _bars(_NAME, BarColumn(), MofNCompleteColumn()) as advance:
        console = _console(soft_wrap=True, highlight=False)
        yield PluginReporter(
            lambda line: console.print(sentence(line)), lambda done, total: advance("compiling kernels", done, total)
        )


def build_progress() -> AbstractContextManager[Callable[[str, int, int], None]]:
    """Give a function (phase, steps done, steps) that draws TensorRT's own progress."""
    return _bars(*Progress.get_default_columns())


@contextmanager
def weight_progress(doing: str = "loading weights") -> Iterator[Callable[[int, int], None]]:
    """Give a function (bytes done, bytes in all) that draws weights being loaded, a part of a step that is timed."""
    with _bars(_NAME, BarColumn(), DownloadColumn(), TransferSpeedColumn(), timed=False) as advance:
        yield lambda done, total: advance(doing, done, total)


@contextmanager
def _bars(*columns: ProgressColumn, timed: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (name, done, in all) that draws a bar a name, on a terminal; each is a step where `timed`."""
    bars = Progress(*columns, console=_console(), transient=True)
    tasks = {}

    def advance(name: str, done: int, total: int) -> None:
        if timed and name not in tasks:
            step(name, shown=False)
        if bars.console.is_terminal:
            bars.start()
        if name not in tasks:
            tasks[name] = bars.add_task(escaped(name))
        bars.update(tasks[name], completed=done, total=total, visible=done < total)

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()
