"""What bench prints for people: a column a batch size."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from deepseek_trt.engines.bench.bench import BenchReport, Point

_MB, _MS = 1e6, 1e3
_ROWS: tuple[tuple[str, Callable[[Point], str]], ...] = (
    ("tokens/s", lambda p: f"{p.tokens_per_second:,.1f}"),
    ("time to first token, ms", lambda p: f"{_MS * p.time_to_first_token:.1f}"),
    ("prefill tokens/s", lambda p: f"{p.prefill_tokens_per_second:,.0f}"),
    *((f"time per token, {q}, ms", lambda p, q=q: f"{_MS * p.time_per_token[q]:.2f}") for q in ("p50", "p95", "p99")),
    *((f"MB a step, {k}", lambda p, k=k: f"{p.bytes_a_step[k] / _MB:.2f}") for k in ("weights", "experts", "cache")),
    ("experts hit a layer", lambda p: f"{p.experts_hit:.1f} ({p.experts})"),
    ("of memory bandwidth", lambda p: f"{100 * p.bandwidth_fraction:.1f} %"),
)


def print_table(report: BenchReport) -> None:
    """A step gives every row one token."""
    first = report.points[0]
    table = Table(box=None, pad_edge=False)
    table.add_column(f"context {first.context}, {first.new_tokens} new tokens")
    for point in report.points:
        table.add_column(f"batch {point.batch_size}", justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *map(cell, report.points))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"memory bandwidth, measured: {report.bandwidth / 1e9:.1f} GB/s; weights in {report.weights_dtype}")
