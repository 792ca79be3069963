"""deepseek-trt build"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from deepseek_trt.engines.plans.plan import BuildSpec

_DEFAULTS = BuildSpec()


@click.command("build", short_help="Build prefill.plan and decode.plan.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--flavour", type=click.Choice(["rtx", "tensorrt"]), default=_DEFAULTS.flavour, show_default=True)
@click.option("--sm", "sms", type=int, multiple=True, help="Chips to build for (rtx: needed, no GPU is).")
@click.option("--max-batch-size", default=_DEFAULTS.max_batch_size, show_default=True)
@click.option("--max-input-len", default=_DEFAULTS.max_input_len, show_default=True, help="Tokens of one prefill.")
@click.option("--max-seq-len", default=_DEFAULTS.max_seq_len, show_default=True, help="Prompt and answer together.")
@click.option("--weights", type=click.Choice(["shared", "embedded"]), default=_DEFAULTS.weights, show_default=True)
@click.option("--embed-plugins", is_flag=True, help="Put the plugin library into the plans.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    bundle: Path,
    flavour: str,
    sms: tuple[int, ...],
    max_batch_size: int,
    max_input_len: int,
    max_seq_len: int,
    weights: Literal["shared", "embedded"],
    embed_plugins: bool,
    as_json: bool,
) -> None:
    """Turn the graphs of BUNDLE into TensorRT engines, MLA and MoE as plugins.

    Example: deepseek-trt build ./v2-lite --sm 86 --sm 120 --max-batch-size 16
    """
    from deepseek_trt.cli.building import build_with_progress

    spec = BuildSpec(flavour, sms, max_batch_size, max_input_len, max_seq_len, weights, embed_plugins)
    for plan in build_with_progress(bundle, spec):
        r = plan.record
        facts = {"plan": str(plan.path), "bytes": r.plan_bytes, "plugins": r.plugins, "fresh": plan.fresh}
        done = "wrote" if plan.fresh else "nothing to do, same inputs as"
        counts = ", ".join(f"{count} {op}" for op, count in r.plugins.items())
        click.echo(json.dumps(facts) if as_json else f"{done} {plan.path} ({r.plan_bytes:,} bytes; {counts})")
