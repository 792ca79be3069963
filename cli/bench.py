"""deepseek-trt bench"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from deepseek_trt.cli.options import backend_option, threads_option


@click.command("bench", short_help="Measure speed, and how near it is to the memory's.")
@click.argument("bundle", type=click.Path(path_type=Path))
@backend_option
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1,), show_default=True)
@click.option("--context", default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--new-tokens", default=64, show_default=True, help="Of each row, at least 3.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool, bundle: Path, **options: object) -> None:
    """Generate from random prompts with the model in BUNDLE and say how fast that was.

    Example: deepseek-trt bench ./v2-lite --batch-size 1 --batch-size 8 --context 512
    """
    from deepseek_trt.cli.bench_table import print_table
    from deepseek_trt.engines.bench.bench import BenchRequest, bench

    report = bench(BenchRequest(bundle, **options), lambda line: click.echo(line, err=True))  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        print_table(report)
