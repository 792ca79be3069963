"""deepseek-trt generate"""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("generate", short_help="Stream text from a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, help="Text to continue; several are run as one batch.")
@click.option("--token-ids", multiple=True, help="A prompt as numbers with commas between.")
@click.option("--chat", is_flag=True, help="Each prompt is a user's message, rendered with the chat template.")
@click.option("--backend", type=click.Choice(["ort", "torch", "tensorrt"]), default="ort", show_default=True)
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=0, show_default=True, help="0 lets the backend choose.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt instead of streaming.")
def command(
    bundle: Path,
    prompt: tuple[str, ...],
    token_ids: tuple[str, ...],
    chat: bool,
    backend: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """Continue each prompt with the model in BUNDLE.

    Example: deepseek-trt generate ./v2-lite --prompt "The number of" --max-new-tokens 64
    """
    from deepseek_trt.cli.streaming import Prompts, stream_answers
    from deepseek_trt.engines.sampling import SamplingParams

    if bool(prompt) == bool(token_ids):
        raise click.UsageError("give either --prompt or --token-ids")
    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed)
    for line in stream_answers(bundle, Prompts(prompt, token_ids, chat), params, backend, threads, live=not as_json):
        click.echo(json.dumps(line, ensure_ascii=False) if as_json else line, nl=as_json)
