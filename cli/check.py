"""deepseek-trt check"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from deepseek_trt.cli.options import MOST, FiniteRange
from deepseek_trt.cli.printing.output import dropped_lines, output_options, print_json, print_rich, say_error
from deepseek_trt.export.bundle.interface import TASKS
from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES
from deepseek_trt.export.config.model_config import DTYPES, ModelConfig
from deepseek_trt.export.memory import CHUNK, CONTEXT
from deepseek_trt.export.survey import GIB, Facts, survey
from deepseek_trt.export.text.wording import escaped

_MEANING = (
    f"memory must exist; file pages are dropped where it is short. Generating: one sequence of {CONTEXT:,} tokens, "
    f"prefilled {CHUNK} at a time."
)


@click.command("check")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the export.  [default: the checkpoint's]")
@click.option("--task", type=click.Choice(TASKS), help="Of the export.  [default: what the checkpoint is for]")
@click.option("--quantize", metavar="int8|int4|fp8|keep|none|FILE", help="What the export is to narrow.")
@click.option("--cache-dtype", type=click.Choice(CACHE_DTYPES), help="What the export is to cache latents as.")
@click.option("--adapter", type=click.Path(path_type=Path), help="The LoRA folder that the export is to merge.")
@click.option(
    "--gpu-memory",
    type=FiniteRange(0, MOST, min_open=True),
    default=80.0,
    show_default=True,
    help="GiB of the GPU it is to run on.",
)
@output_options()
def command(checkpoint: Path, gpu_memory: float, as_json: bool, **options: Any) -> None:
    """Read config.json and the shards' headers of CHECKPOINT: what the model is, what each step needs, what is refused.

    CHECKPOINT is a folder, or a name on Hugging Face's hub that its cache on this machine holds.

    Exit code 1 where it cannot be exported.

    Example: deepseek-trt check ./DeepSeek-V2-Lite --gpu-memory 24
    """
    result = survey(checkpoint, gpu_bytes=int(gpu_memory * GIB), **options)
    if as_json:
        print_json(result.to_dict())
    elif result.facts is not None:
        _print_tables(result.facts, gpu_memory)
    for sentence in (*result.unsupported, *([result.problem] if result.problem else [])):
        say_error(sentence)
    if result.facts is None:
        sys.exit(1)


def _print_tables(facts: Facts, gpu_memory: float) -> None:
    from rich.table import Table

    model = Table(show_header=False, box=None)
    for name, value in _model_rows(facts, gpu_memory):
        model.add_row(name, escaped(value))
    needs = Table("step", "disk", "memory", "file pages", box=None)
    for need in facts.needs:
        sizes = ("refused", "", "") if need.refused else map(_size, (need.disk, need.memory, need.file_pages))
        needs.add_row(need.step, *sizes)
    refused = [f"refused: {need.step}: {need.refused}" for need in facts.needs if need.refused]
    capacity = Table("context", f"sequences at once on {gpu_memory:g} GiB", box=None)
    for row in facts.capacities:
        why = " (TensorRT's page pools hold fewer than 2^31 numbers)" if row.limited else ""
        capacity.add_row(f"{row.context:,}", f"{row.batch}{why}" if row.batch else "does not fit")
    notes = [*dropped_lines(facts.dropped), *(f"note: {note}" for note in facts.notes)]
    print_rich(model, needs, *refused, _MEANING, *([capacity] if facts.capacities else []), *notes)


def _model_rows(facts: Facts, gpu_memory: float) -> Iterator[tuple[str, str]]:
    c = facts.config
    yield "parameters", f"{facts.parameters:,} ({facts.active_parameters / 1e9:.1f}e9 active per token)"
    yield "checkpoint", f"{_size(facts.stored_bytes)}, {facts.tensors:,} tensors, {facts.shards} shards"
    yield "task", facts.task
    yield "dtype of the export", facts.dtype
    yield "layers, hidden, vocabulary", f"{c.num_hidden_layers}, {c.hidden_size}, {c.vocab_size}"
    yield "attention", _attention(c)
    yield "router", _router(c)
    yield "rope", _rope(c)
    held = f"{facts.cache_bytes_per_token:,} bytes ({facts.cache})"
    yield "cache per token", f"{held}; expanded {facts.expanded_bytes_per_token:,}"
    yield "saved by latents", f"{100 * facts.cache_saving:.1f} %"
    yield f"cache beside weights, {gpu_memory:g} GiB", f"{facts.context_tokens:,} tokens of context, by memory alone"


def _attention(c: ModelConfig) -> str:
    query = f"query rank {c.q_lora_rank}" if c.q_lora_rank else "full-rank queries"
    widths = f"{c.qk_nope_head_dim}+{c.qk_rope_head_dim}/{c.v_head_dim}"
    return f"{c.num_attention_heads} heads of {widths}, latent rank {c.kv_lora_rank}, {query}"


def _router(c: ModelConfig) -> str:
    moe = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
    if not moe:
        return "none, every layer is dense"
    of, best = c.routing_groups
    groups = f", best {best} of {of} groups" if of > 1 else ""
    experts = f"{c.num_experts_per_tok} of {c.n_routed_experts} experts + {c.n_shared_experts} shared"
    return f"{c.topk_method}, {experts}{groups}, in {moe} layers"


def _rope(c: ModelConfig) -> str:
    scaled = "" if c.rope.kind == "default" else f", {c.rope.kind} x {c.rope.factor:g}"
    return f"theta {c.rope.theta:g}{scaled}, {c.max_position_embeddings:,} positions"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
