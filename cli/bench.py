"""deepseek-trt bench"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.options import COUNT, MOST, backend_option, speculate_option, threads_option, verify_option
from deepseek_trt.cli.printing.output import output_options, print_json, print_rich, step

if TYPE_CHECKING:
    from deepseek_trt.engines.bench.bench import BenchReport, Point

_MB, _MS = 1e6, 1e3
_ROWS: tuple[tuple[str, Callable[[Point], str]], ...] = (
    ("tokens/s", lambda p: f"{p.tokens_per_second:,.1f}"),
    ("time to first token, ms", lambda p: f"{_MS * p.time_to_first_token:.1f}"),
    ("prefill tokens/s", lambda p: f"{p.prefill_tokens_per_second:,.0f}"),
    *((f"time per token, {q}, ms", lambda p, q=q: f"{_MS * p.time_per_token[q]:.2f}") for q in ("p50", "p95", "p99")),
    *((f"MB a step, {k}", lambda p, k=k: f"{p.bytes_a_step[k] / _MB:.2f}") for k in ("weights", "experts", "cache")),
    ("experts hit a layer", lambda p: f"{p.experts_hit:.1f} ({p.experts})"),
    ("tokens a step", lambda p: f"{p.tokens_a_step:.2f}"),
    ("proposed tokens that were picked", lambda p: f"{100 * p.acceptance:.0f} %"),
    ("of memory bandwidth", lambda p: f"{100 * p.bandwidth_fraction:.1f} %"),
)


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_option
@click.option(
    "--batch-size",
    "batch_sizes",
    type=COUNT,
    multiple=True,
    default=(1,),
    show_default=True,
    help="Prompts at once; may be given several times.",
)
@click.option("--context", type=COUNT, default=512, show_default=True, help="Tokens of each prompt.")
@click.option(
    "--new-tokens", type=click.IntRange(3, MOST), default=64, show_default=True, help="Tokens of each answer."
)
@threads_option
@speculate_option
@verify_option
@output_options("Print the report as JSON.")
def command(as_json: bool, bundle: Path, **options: Any) -> None:
    """Generate from random prompts with the model in BUNDLE and say how fast that was.

    Example: deepseek-trt bench ./v2-lite --batch-size 1 --batch-size 8 --context 512
    """
    from deepseek_trt.cli.printing.progress import weight_progress
    from deepseek_trt.engines.bench.bench import BenchRequest, bench

    with weight_progress() as progress:
        report = bench(BenchRequest(bundle, **options), step, progress)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print_table(report)


def _print_table(report: BenchReport) -> None:
    """Print a column a batch size; without speculation a step gives every row one token."""
    from rich.table import Table

    first = report.points[0]
    table = Table(box=None, pad_edge=False)
    table.add_column(f"context {first.context}, {first.new_tokens} new tokens")
    for point in report.points:
        table.add_column(f"batch {point.batch_size}", justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *map(cell, report.points))
    kinds = ", ".join((*report.narrow_formats, report.weights_dtype))
    measured = f"memory bandwidth, measured: {report.bandwidth / 1e9:.1f} GB/s; weights in {kinds}"
    print_rich(table, measured)
