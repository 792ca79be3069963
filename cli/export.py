"""deepseek-trt export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deepseek_trt.cli.printing.output import json_option, print_result, say, wrote
from deepseek_trt.export.bundle.interface import IOS, NATIVE, TASKS
from deepseek_trt.export.config.model_config import DTYPES


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(TASKS), help="Default: what the checkpoint is for, by its heads.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the checkpoint's.")
@click.option("--io", type=click.Choice(IOS), default=NATIVE, show_default=True, help="Names and cache of the graphs.")
@click.option("--no-cache", is_flag=True, help="feature-extraction in one graph, for embedding whole texts.")
@click.option("--inputs-embeds", is_flag=True, help="The graphs take embeddings instead of token ids.")
@click.option("--hidden-states", is_flag=True, help="feature-extraction gives every layer's output, too.")
@click.option("--all-logits", is_flag=True, help="Prefill gives the logits of every token, not of the last one only.")
@click.option("--logits-to-keep", type=int, help="Prefill gives the logits of the last K tokens; 0 is all.")
@click.option("--by-reference", is_flag=True, help="Write no weights: read the checkpoint's at run time.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA folder of peft to merge into the weights.")
@click.option("--num-layers", type=int, help="Export only the first layers, to debug accuracy.")
@click.option("--allow-nonfinite", is_flag=True, help="Go on where weights are NaN or infinite; a note says which.")
@click.option("--allow-zeros", is_flag=True, help="Go on where matrices or norms are zeros alone; a note says which.")
@json_option
def command(checkpoint: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Trace CHECKPOINT (config.json and safetensors) into ONNX graphs in OUT: prefill and decode, or one model.

    Example: deepseek-trt export ./DeepSeek-V2-Lite ./v2-lite --dtype bfloat16
    """
    from deepseek_trt.cli.printing.progress import export_reporter
    from deepseek_trt.export.exporter import ExportRequest, export_bundle

    with export_reporter() as report:
        result = export_bundle(ExportRequest(checkpoint, out, **options), report)
    manifest = result.bundle.manifest
    for note in (*manifest.notes, *(f"dropped {d.name}: {d.reason}" for d in manifest.dropped)):
        say(f"note: {note}")
    tensors = len(manifest.weights)
    facts = {"bundle": str(out), "fresh": result.fresh, "dtype": manifest.dtype, "tensors": tensors}
    print_result(as_json, facts, f"{wrote(result.fresh, out)} ({manifest.dtype}, {tensors} tensors)")
