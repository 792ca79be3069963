"""deepseek-trt validate"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from deepseek_trt.cli.heads_validation import generates, validate_other_heads

EXIT_ACCURACY = 3
HELP = "ort: the graphs as exported; ort-compiled: as generate runs them.  [default: these two]"
CHECKPOINT_HELP = "Whose weights the reference takes.  [default: the one that was exported]"
BACKENDS = ("ort", "ort-compiled", "torch", "transformers", "kernels", "tensorrt")


@click.command("validate", short_help="Compare the bundle with PyTorch.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True, help=HELP)
@click.option("--report", type=click.Path(path_type=Path), help="Folder for report.json, report.html and more.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on.  [default: one that ships]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn tokens and the order of pages.")
@click.option("--bisect", is_flag=True, help="Where something fails, name the first layer and op that does.")
@click.option("--layers", help="Only these layers, one in memory at a time, as 0-3,26.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help=CHECKPOINT_HELP)
@click.option("--compare", type=click.Path(path_type=Path), help="An earlier report.json: show what moved.")
@click.option("--threads", type=int, default=0, help="0 lets each backend choose.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(report: Path | None, compare: Path | None, as_json: bool, **options: object) -> None:
    """Run BUNDLE's graphs beside torch in float32 and compare logits and cached latents, step by step.

    Exits with 3 when an output leaves its tolerance, or got worse since the report given with --compare.

    Example: deepseek-trt validate ./v2-lite --backend ort --report ./accuracy
    """
    from deepseek_trt.validate import accuracy
    from deepseek_trt.validate.findings import baseline
    from deepseek_trt.validate.report import files, summary

    if not generates(Path(str(options["bundle"]))):
        passed = validate_other_heads(report, as_json, compare=compare, **options)
        click.get_current_context().exit(0 if passed else EXIT_ACCURACY)
    old = baseline.read_report(compare) if compare else None
    request = accuracy.ValidateRequest(command=" ".join(sys.argv), **options)  # type: ignore[arg-type]
    validation = accuracy.validate_bundle(request, lambda line: click.echo(line, err=True))
    changes = baseline.compare_reports(old, validation.report) if old else ()
    if report is not None:
        files.write_report(validation.report, validation.pairs, report)
    if as_json:
        facts = {**summary.summary(validation.report), "changes": [dataclasses.asdict(c) for c in changes]}
        click.echo(json.dumps(facts))
    else:
        summary.print_summary(validation.report)
        summary.print_changes(changes) if old else None
    good = validation.report.passed and not any(change.worse for change in changes)
    click.get_current_context().exit(0 if good else EXIT_ACCURACY)
