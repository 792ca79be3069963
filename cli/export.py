"""deepseek-trt export"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from deepseek_trt.cli.options import COUNT, MOST
from deepseek_trt.cli.printing.output import dropped_lines, output_options, print_result, say, wrote
from deepseek_trt.export.bundle.interface import IOS, NATIVE, TASKS
from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES
from deepseek_trt.export.config.model_config import DTYPES

QUANTIZE_HELP = (
    "Store weights in narrow formats: a preset, keep (fp8 as it is), none, or a JSON file (docs/narrow.md)."
    "  [default: keep where the checkpoint is fp8, else none]"
)
MTP_HELP = "A third graph: the layer of multi-token prediction, for --speculate mtp."
CACHE_HELP = "Cache latents as codes of 8 bits with scales (docs/narrow.md).  [default: whole]"
KEEP_HELP = "Prefill gives the logits of this many last tokens; 0 is all.  [default: 1]"


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(TASKS), help="Of the graphs.  [default: the checkpoint's, by its heads]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights.  [default: the checkpoint's]")
@click.option("--io", type=click.Choice(IOS), default=NATIVE, show_default=True, help="Names and cache of the graphs.")
@click.option("--no-cache", is_flag=True, help="feature-extraction in one graph, for embedding whole texts.")
@click.option("--inputs-embeds", is_flag=True, help="The graphs take embeddings instead of token ids.")
@click.option("--hidden-states", is_flag=True, help="feature-extraction gives every layer's output, too.")
@click.option("--all-logits", is_flag=True, help="Prefill gives the logits of every token, not of the last one only.")
@click.option("--logits-to-keep", type=click.IntRange(0, MOST), help=KEEP_HELP)
@click.option("--by-reference", is_flag=True, help="Write no weights: read the checkpoint's at run time.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA folder of peft to merge into the weights.")
@click.option("--mtp", is_flag=True, help=MTP_HELP)
@click.option("--quantize", metavar="int8|int4|fp8|keep|none|FILE", help=QUANTIZE_HELP)
@click.option("--cache-dtype", type=click.Choice(CACHE_DTYPES), help=CACHE_HELP)
@click.option("--num-layers", type=COUNT, help="Export so many of the first layers alone, to debug.  [default: all]")
@click.option("--allow-nonfinite", is_flag=True, help="Go on where weights are NaN or infinite; a note says which.")
@click.option("--allow-zeros", is_flag=True, help="Go on where matrices or norms are zeros alone; a note says which.")
@output_options()
def command(checkpoint: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Trace CHECKPOINT (config.json and safetensors) into ONNX graphs in OUT: prefill and decode, or one model.

    CHECKPOINT is a folder, or a name on Hugging Face's hub that its cache on this machine holds.

    Example: deepseek-trt export ./DeepSeek-V2-Lite ./v2-lite --dtype bfloat16

    Example: deepseek-trt export ./DeepSeek-V2-Lite ./v2-lite-int4 --quantize int4
    """
    from deepseek_trt.cli.printing.progress import export_reporter
    from deepseek_trt.export.exporter import ExportRequest, export_bundle

    with export_reporter() as report:
        result = export_bundle(ExportRequest(checkpoint, out, **options), report)
    manifest = result.bundle.manifest
    for line in (*(f"note: {note}" for note in manifest.notes), *dropped_lines(manifest.dropped)):
        say(line)
    tensors, narrow = len(manifest.weights), manifest.quantization
    facts = {"bundle": str(out), "fresh": result.fresh, "dtype": manifest.dtype, "tensors": tensors}
    facts["quantization"] = None if narrow is None else asdict(narrow)
    facts["cache"] = manifest.cache.format
    kinds = manifest.dtype if narrow is None else f"{manifest.dtype}, {' and '.join(manifest.narrow_formats)}"
    cached = f", cache {manifest.cache.format}" if manifest.cache.narrow else ""
    print_result(as_json, facts, f"{wrote(result.fresh, out)} ({kinds}, {tensors} tensors{cached})")
