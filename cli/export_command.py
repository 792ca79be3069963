"""deepseek-trt export"""

from __future__ import annotations

import json
from pathlib import Path

import click

from deepseek_trt.export.config import DTYPES


@click.command("export", short_help="Write a bundle.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(["text-generation"]), default="text-generation", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the checkpoint's.")
@click.option("--all-logits", is_flag=True, help="Prefill gives the logits of every token, not of the last one only.")
@click.option("--by-reference", is_flag=True, help="Write no weights: read the checkpoint's at run time.")
@click.option("--num-layers", type=int, help="Export only the first layers, to debug accuracy.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoint: Path,
    out: Path,
    task: str,
    dtype: str | None,
    all_logits: bool,
    by_reference: bool,
    num_layers: int | None,
    as_json: bool,
) -> None:
    """Trace CHECKPOINT (config.json and safetensors) into prefill.onnx and decode.onnx in OUT.

    Example: deepseek-trt export ./DeepSeek-V2-Lite ./v2-lite --dtype bfloat16
    """
    from deepseek_trt.cli.progress import export_reporter
    from deepseek_trt.export.exporter import ExportRequest, export_checkpoint

    request = ExportRequest(checkpoint, out, task, dtype, all_logits, by_reference, num_layers)
    with export_reporter() as report:
        result = export_checkpoint(request, report)
    manifest = result.bundle.manifest
    for note in (*manifest.notes, *(f"dropped {d.name}: {d.reason}" for d in manifest.dropped)):
        click.echo(f"note: {note}", err=True)
    if as_json:
        facts = {"bundle": str(out), "fresh": result.fresh, "dtype": manifest.dtype, "tensors": len(manifest.weights)}
        click.echo(json.dumps(facts))
    else:
        done = "wrote" if result.fresh else "nothing to do, same inputs as"
        click.echo(f"{done} {out} ({manifest.dtype}, {len(manifest.weights)} tensors)")
