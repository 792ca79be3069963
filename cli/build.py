"""deepseek-trt build"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deepseek_trt.cli.options import COUNT, bundle_argument, verify_option
from deepseek_trt.cli.printing.output import output_options, print_result, say, wrote
from deepseek_trt.engines.plans.plan import BuildSpec

_DEFAULTS = BuildSpec()


@click.command("build")
@bundle_argument
@click.option(
    "--flavour",
    "--flavor",
    type=click.Choice(["rtx", "tensorrt"]),
    default=_DEFAULTS.flavour,
    show_default=True,
    help="TensorRT-RTX or TensorRT.",
)
@click.option("--sm", "sms", type=COUNT, multiple=True, help="Chips to build for, as 86 (rtx: needed, no GPU is).")
@click.option(
    "--max-batch-size",
    type=COUNT,
    default=_DEFAULTS.max_batch_size,
    show_default=True,
    help="Sequences of one step.",
)
@click.option(
    "--max-input-len",
    type=COUNT,
    show_default="4096 on SM 90 to 103, else 2048; less where memory or --max-seq-len is short",
    help="Tokens of one prefill, of each sequence.",
)
@click.option(
    "--max-seq-len",
    type=COUNT,
    default=_DEFAULTS.max_seq_len,
    show_default=True,
    help="Tokens of prompt and answer together.",
)
@click.option(
    "--weights",
    type=click.Choice(["shared", "embedded"]),
    default=_DEFAULTS.weights,
    show_default=True,
    help="shared: both plans read the bundle's; embedded: each plan holds its own.",
)
@click.option("--embed-plugins", is_flag=True, help="Put the plugin library into the plans.")
@verify_option
@output_options("Print one JSON object a plan.")
def command(bundle: Path, as_json: bool, max_input_len: int | None, **options: Any) -> None:
    """Turn the graphs of BUNDLE into TensorRT engines, MLA and MoE as plugins.

    Example: deepseek-trt build ./v2-lite --sm 86 --sm 120 --max-batch-size 16
    """
    from deepseek_trt.cli.printing.progress import build_progress, plugin_reporter
    from deepseek_trt.engines.plans.request import BuildRequest, build_plans

    spec = BuildSpec(max_input_len=max_input_len or _DEFAULTS.max_input_len, **options)
    with plugin_reporter() as plugins, build_progress() as progress:
        plans = build_plans(BuildRequest(bundle, spec), progress, plugins)
    if not max_input_len:
        say(f"engines take {plans[0].record.spec.max_input_len} tokens of a prompt at once (--max-input-len)")
    for note in filter(None, dict.fromkeys(plan.note for plan in plans)):
        say(f"note: {note}")
    for plan in plans:
        r = plan.record
        counts = ", ".join(f"{count} {op}" for op, count in r.plugins.items())
        facts = {
            "plan": str(plan.path),
            "bytes": r.plan_bytes,
            "plugins": r.plugins,
            "fresh": plan.fresh,
            "note": plan.note,
        }
        print_result(as_json, facts, f"{wrote(plan.fresh, plan.path)} ({r.plan_bytes:,} bytes; {counts})")
