"""deepseek-trt generate"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_trt.cli.options import backend_option, sampling_options, threads_option
from deepseek_trt.cli.output import print_result, say
from deepseek_trt.export.errors import RequestError

if TYPE_CHECKING:
    from deepseek_trt.engines.generation.answer import Result
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.generation.params import SamplingParams
    from deepseek_trt.engines.text.text import Text


@dataclass(frozen=True)
class Prompts:
    """What the user gave: texts, or comma-separated token ids."""

    texts: tuple[str, ...]
    token_ids: tuple[str, ...]
    chat: bool


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
    if bool(prompt) == bool(token_ids):
        raise click.UsageError("give either --prompt or --token-ids")
    if params.logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are printed with --json only")
    with _opened(bundle, Prompts(prompt, token_ids, chat), params, backend, threads) as (llm, ids):
        if len(ids) == 1 and not as_json:
            for piece in llm.stream(ids[0], params):
                click.echo(piece.text if llm.text else f"{piece.token_id} ", nl=False)
            click.echo()
        else:
            for result in llm.generate(ids, params):
                print_result(as_json, _facts(result), _paragraph(result))


@contextmanager
def _opened(
    path: Path, prompts: Prompts, params: SamplingParams, backend: str, threads: int
) -> Iterator[tuple[LLM, list[list[int]]]]:
    """Give an LLM with room for all prompts at once, and their token ids; say on stderr what runs it, and why."""
    from deepseek_trt.cli.progress import weight_progress
    from deepseek_trt.engines.generation.llm import LLM
    from deepseek_trt.engines.generation.pages import answer_lengths, pages_needed
    from deepseek_trt.engines.generation.scheduler import SchedulerLimits
    from deepseek_trt.engines.sessions.opening import SessionRequest, check_generates, open_session
    from deepseek_trt.engines.text.text import Text
    from deepseek_trt.export.bundle.folder import Bundle

    bundle = Bundle.open(path)
    check_generates(bundle)
    text = Text(bundle) if bundle.tokenizer_path or prompts.texts else None
    ids = _encode(prompts, text)
    config = bundle.manifest.model
    pages = pages_needed(bundle.manifest.cache, answer_lengths(config, ids, params.max_new_tokens))
    with weight_progress() as progress:
        started = open_session(SessionRequest(bundle, pages, threads, progress=progress), backend)
    say(started.line)
    with LLM(started.session, config, text, SchedulerLimits.for_batch(len(ids)), started.choice) as llm:
        yield llm, ids


def _encode(prompts: Prompts, text: Text | None) -> list[list[int]]:
    if prompts.texts:
        assert text is not None
        if prompts.chat:
            return [text.encode_chat([{"role": "user", "content": content}]) for content in prompts.texts]
        return [text.encode(content) for content in prompts.texts]
    try:
        return [[int(part) for part in ids.split(",")] for ids in prompts.token_ids]
    except ValueError:
        given = prompts.token_ids[0]
        raise RequestError(f"--token-ids {given!r}: give numbers with commas between, e.g. 0,17,4") from None


def _facts(result: Result) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "prompt_ids": result.prompt_ids,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "text": result.text,
    }
    if result.logprobs is not None:
        facts |= {"logprobs": result.logprobs, "top_logprobs": result.top_logprobs}
    return facts


def _paragraph(result: Result) -> str:
    body = result.text if result.text is not None else " ".join(map(str, result.token_ids))
    return f"--- {result.finish_reason}, {len(result.token_ids)} tokens\n{body}"
