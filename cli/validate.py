"""deepseek-trt validate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from deepseek_trt.cli.options import FiniteRange, bundle_argument, threads_option, verify_option
from deepseek_trt.cli.printing.output import output_options, print_json, step
from deepseek_trt.validate.request import BACKENDS, ValidateRequest, check_name

EXIT_ACCURACY = 3
HELP = "exported: the graphs as exported; ort: as generate runs them.  [default: these two]"
INDEPENDENT_HELP = "Run transformers beside the reference, or fail; or leave it out.  [default: where it can run]"
CHECKPOINT_HELP = (
    "Whose weights the reference takes: a folder, or a name in Hugging Face's cache.  [default: the exported one]"
)


class _Backend(click.Choice):  # type: ignore[type-arg]  # generic in click 8.2 only
    """The choices; a name of before is refused with the one of now."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        check_name(value)
        return super().convert(value, param, ctx)


@click.command("validate")
@bundle_argument
@click.option("--backend", "backends", type=_Backend(BACKENDS), multiple=True, help=HELP)
@click.option("--report", type=click.Path(path_type=Path), help="Folder for report.json, report.html and more.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on.  [default: one that ships]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the drawn tokens and the order of pages."
)
@click.option("--bisect", is_flag=True, help="Where something fails, name the first layer and op that does.")
@click.option("--layers", help="Only these layers, one in memory at a time, as 0-3,26.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help=CHECKPOINT_HELP)
@click.option("--independent/--no-independent", default=None, help=INDEPENDENT_HELP)
@click.option("--compare", type=click.Path(path_type=Path), help="An earlier report.json: show what moved.")
@click.option(
    "--max-kl", type=FiniteRange(0), help="Nats that narrow weights and cache may cost, the mean; more exits with 3."
)
@click.option("--max-perplexity-increase", type=FiniteRange(0), help="Percent that they may cost; more exits with 3.")
@threads_option
@verify_option
@output_options()
def command(report: Path | None, compare: Path | None, as_json: bool, **options: Any) -> None:
    """Run BUNDLE's graphs beside torch in float32 and compare logits and cached latents, step by step.

    Where transformers is installed and the model fits, it checks the reference first, from the checkpoint's own files.

    Exits with 3 when an output leaves its tolerance, or got worse since the report given with --compare. What narrow
    weights cost beside the checkpoint's is said, and judged where a limit is given.

    Example: deepseek-trt validate ./v2-lite --backend exported --report ./accuracy
    """
    from deepseek_trt.cli.printing.accuracy import print_report
    from deepseek_trt.validate.accuracy import validate_bundle
    from deepseek_trt.validate.report.files import make_folder, write_report
    from deepseek_trt.validate.report.summary import summary

    if report is not None:
        make_folder(report)  # before minutes of work
    done = validate_bundle(ValidateRequest(command=" ".join(sys.argv), earlier=compare, **options), step)
    if report is not None:
        write_report(done.report, done.comparisons, report)
    if as_json:
        print_json({**summary(done.report), "report": str(report) if report else None})
    else:
        print_report(done.report, report)
    click.get_current_context().exit(0 if done.report.is_good else EXIT_ACCURACY)
