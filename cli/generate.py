"""deepseek-trt generate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepseek_trt.cli.options import backend_option, sampling_options, threads_option

if TYPE_CHECKING:
    from deepseek_trt.engines.generation.params import SamplingParams


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, help="Text to continue; several are run as one batch.")
@click.option("--token-ids", multiple=True, help="A prompt as numbers with commas between.")
@click.option("--chat", is_flag=True, help="Each prompt is a user's message, rendered with the chat template.")
@backend_option
@sampling_options
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt instead of streaming.")
def command(
    bundle: Path,
    prompt: tuple[str, ...],
    token_ids: tuple[str, ...],
    chat: bool,
    backend: str,
    params: SamplingParams,
    threads: int,
    as_json: bool,
) -> None:
    """Continue each prompt with the model in BUNDLE.

    Example: deepseek-trt generate ./v2-lite --prompt "The number of" --max-new-tokens 64
    """
    from deepseek_trt.cli.streaming import Prompts, stream_answers

    if bool(prompt) == bool(token_ids):
        raise click.UsageError("give either --prompt or --token-ids")
    if params.logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are printed with --json only")
    for line in stream_answers(bundle, Prompts(prompt, token_ids, chat), params, backend, threads, live=not as_json):
        click.echo(json.dumps(line, ensure_ascii=False) if as_json else line, nl=as_json)
