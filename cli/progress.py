"""Progress on stderr: a line a step, with a bar of bytes where their number is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deepseek_trt.export.exporter import Reporter


@contextmanager
def export_reporter(quiet: bool = False) -> Iterator[Reporter]:
    """A Reporter that draws on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, disable=quiet) as bars:
        current = [bars.add_task("", visible=False, total=None)]

        def step(text: str, total: int | None) -> None:
            bars.stop_task(current[0])
            if total is None:
                console.print(text)
                current[0] = bars.add_task(text, visible=False, total=None)
            else:
                current[0] = bars.add_task(text, total=total)

        def advance(done: int) -> None:
            bars.advance(current[0], done)

        yield Reporter(step, advance)


@contextmanager
def weight_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr of the weights' way to the GPU; nothing is drawn before the first call (bytes done, in all)."""
    columns = (TextColumn("weights to the GPU"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bars.add_task("")

    def advance(done: int, total: int) -> None:
        bars.start()
        bars.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()
