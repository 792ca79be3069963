"""What generate prints: one prompt's text as it grows, or all answers when they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from deepseek_trt.cli.progress import weight_progress
from deepseek_trt.engines.generation.answer import Result
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.pages import answer_lengths, pages_needed
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import SchedulerLimits
from deepseek_trt.engines.generation.text import Text
from deepseek_trt.engines.sessions.opening import SessionRequest, check_generates, open_session
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import RequestError


@dataclass(frozen=True)
class Prompts:
    """What the user gave: texts, or comma-separated token ids."""

    texts: tuple[str, ...]
    token_ids: tuple[str, ...]
    chat: bool


def stream_answers(
    path: Path, prompts: Prompts, params: SamplingParams, backend: str, threads: int, live: bool
) -> Iterator[Any]:
    """Pieces of text where `live`, else one dict a prompt: prompt_ids, token_ids, text, finish_reason, logprobs."""
    bundle = Bundle.open(path)
    check_generates(bundle)
    text = Text(bundle) if bundle.tokenizer_path or prompts.texts else None
    ids = _encode(prompts, text)
    with _open(bundle, ids, params, backend, threads, text) as llm:
        if live and len(ids) == 1:
            for piece in llm.stream(ids[0], params):
                yield piece.text if text else f"{piece.token_id} "
            yield "\n"
            return
        for result in llm.generate(ids, params):
            yield _paragraph(result) if live else _facts(result)


def _open(
    bundle: Bundle, ids: list[list[int]], params: SamplingParams, backend: str, threads: int, text: Text | None
) -> LLM:
    """An LLM with room for all prompts at once; says on stderr what runs it, and why."""
    config = bundle.manifest.model
    pages = pages_needed(bundle.manifest.cache, answer_lengths(config, ids, params.max_new_tokens))
    with weight_progress() as progress:
        started = open_session(SessionRequest(bundle, pages, threads, progress=progress), backend)
    click.echo(started.line, err=True)
    return LLM(started.session, config, text, SchedulerLimits.for_batch(len(ids)), started.choice)


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
    return f"--- {result.finish_reason}, {len(result.token_ids)} tokens\n{body}\n"
