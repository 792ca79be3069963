"""What generate prints: one prompt's text as it grows, or all answers when they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from deepseek_trt.engines.backends import BACKENDS, SessionRequest
from deepseek_trt.engines.generate import Step, generate, pages_needed
from deepseek_trt.engines.sampling import SamplingParams
from deepseek_trt.engines.text import Text
from deepseek_trt.export.bundle import Bundle
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
    """Pieces of text where `live`, else one dict a prompt: prompt_ids, token_ids, text and finish_reason."""
    bundle = Bundle.open(path)
    text = Text(bundle) if bundle.tokenizer_path or prompts.texts else None
    ids = _encode(prompts, text)
    config = bundle.manifest.model
    pages = pages_needed(config, bundle.manifest.cache.page_size, ids, params.max_new_tokens)
    session = BACKENDS[backend](SessionRequest(bundle, pages, threads))
    click.echo(f"backend: {session.backend}" + (f" ({session.note})" if session.note else ""), err=True)
    steps = generate(session, config, ids, params)
    if live and len(ids) == 1:
        yield from _pieces(steps, text)
        return
    for answer in _answers(steps, ids, text, config.eos_token_ids):
        yield _paragraph(answer) if live else answer


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


def _pieces(steps: Iterator[Step], text: Text | None) -> Iterator[str]:
    stream = text.stream() if text else None
    for step in steps:
        yield stream.push(step.token) if stream else f"{step.token} "
    yield "\n"


def _answers(
    steps: Iterator[Step], prompts: list[list[int]], text: Text | None, stops: tuple[int, ...]
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = [{"prompt_ids": ids, "token_ids": [], "finish_reason": None} for ids in prompts]
    for step in steps:
        answers[step.row]["token_ids"].append(step.token)
        answers[step.row]["finish_reason"] = step.finished
    for answer in answers:
        answer["text"] = text.decode(answer["token_ids"]) if text else None
    return answers


def _paragraph(answer: dict[str, Any]) -> str:
    body = answer["text"] if answer["text"] is not None else " ".join(map(str, answer["token_ids"]))
    return f"--- {answer['finish_reason']}, {len(answer['token_ids'])} tokens\n{body}\n"
