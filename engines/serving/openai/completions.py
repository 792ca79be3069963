"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_trt.engines.serving.openai.answering import Answering, Question, ask, merged
from deepseek_trt.engines.serving.openai.bodies import CompletionBody, StreamOptions
from deepseek_trt.engines.serving.openai.errors import invalid, unsupported
from deepseek_trt.engines.serving.openai.guides import asking_param, guide_of, naming_guide
from deepseek_trt.engines.serving.openai.logprobs import CompletionLogprobs
from deepseek_trt.engines.serving.openai.sampling import sampling_params, seeds_of
from deepseek_trt.engines.serving.openai.served import Served, usage
from deepseek_trt.engines.text.text import Text

_MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that an echo gives."""

    ids: list[int]
    text: str


class Completions:
    """One request, taken by the engine: `whole` or `chunks`, once."""

    def __init__(self, served: Served, body: CompletionBody, prompts: Sequence[Prompt], taken: list[Answering]) -> None:
        assert served.text is not None
        self._taken, self._prompts, self._each = taken, prompts, body.n or 1
        self._head = served.head("text_completion", body.model or served.names[0], "cmpl")
        self._options = body.stream_options or StreamOptions()
        echoes = [prompt.text if body.echo else "" for prompt in prompts for _ in range(self._each)]
        self._echoes, wanted = echoes, body.logprobs
        self._logprobs = [
            None if wanted is None else CompletionLogprobs(served.text.token_bytes, wanted, len(echo))
            for echo in echoes
        ]

    @classmethod
    async def ask(cls, served: Served, body: CompletionBody) -> Completions:
        """Raises ApiError and RequestError, and then nothing has been taken."""
        text = served.text
        assert text is not None
        _check(body)
        guide = guide_of(body, body.response_format)
        params = sampling_params(body, served.defaults, _MAX_TOKENS, body.logprobs, guide)
        prompts = await asyncio.to_thread(_prompts, text, body.prompt)
        served.check_choices(len(prompts) * (body.n or 1), "n")
        own = seeds_of(params, len(prompts) * (body.n or 1))
        questions = [Question(prompt.ids, next(own), body.timeout_ms) for prompt in prompts for _ in range(body.n or 1)]
        with naming_guide(asking_param(body, body.response_format)):
            return cls(served, body, prompts, await ask(served.engine, text, questions))

    def leave(self) -> None:
        for answer in self._taken:
            answer.leave()

    async def whole(self) -> dict[str, Any]:
        choices = [self._choice(index, echo) for index, echo in enumerate(self._echoes)]
        pieces: list[list[Any]] = [[] for _ in choices]
        async for index, delta in merged(self._taken):
            choices[index]["text"] += delta.text
            choices[index]["finish_reason"] = delta.finish
            pieces[index] += delta.pieces
        for choice, own, made in zip(choices, self._logprobs, pieces, strict=True):
            choice["logprobs"] = own.of(made) if own else None
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        for index, echo in enumerate(self._echoes):
            if echo:
                yield self._chunk([self._choice(index, echo)])
        async for index, delta in merged(self._taken):
            own = self._logprobs[index]
            logprobs = own.of(delta.pieces) if own else None
            if delta.text or delta.finish or logprobs:
                yield self._chunk([self._choice(index, delta.text, delta.finish, logprobs)])
        if self._options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _choice(self, index: int, text: str, finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        if self._options.continuous_usage_stats:
            return {**chunk, "usage": self._usage()}
        return {**chunk, "usage": None} if self._options.include_usage else chunk

    def _usage(self) -> dict[str, int]:
        """A prompt counts once, however many answers it gets."""
        return usage(sum(len(p.ids) for p in self._prompts), sum(answer.made for answer in self._taken))


def check_stream(stream: bool | None, options: StreamOptions | None) -> None:
    if options is not None and not stream:
        raise invalid(
            "stream_options: is for streamed answers alone; give stream true, or leave it out", "stream_options"
        )
    if options is not None and options.include_obfuscation:
        raise unsupported("stream_options", "include_obfuscation is not supported; leave it out")


def _check(body: CompletionBody) -> None:
    check_stream(body.stream, body.stream_options)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported("best_of", f"{body.best_of} is not n, {body.n or 1}: answers are not ranked; leave it out")
    if body.echo and body.logprobs is not None:
        raise unsupported("echo", "the prompt's tokens have no logprobs here; leave out one of them")
    if body.n is not None and body.n < 1:
        raise invalid(f"n {body.n}: must be at least 1", "n")


def _prompts(text: Text, given: str | list[Any]) -> list[Prompt]:
    """One prompt or several, as text or as token ids. Raises ApiError and RequestError."""
    several: list[Any] = given if isinstance(given, list) else [given]
    if not several:
        raise invalid("prompt: is an empty list; give text, or token ids", "prompt")
    if all(isinstance(token, int) for token in several):
        return [_of_ids(text, several)]
    if any(isinstance(one, int) for one in several) or len({type(one) for one in several}) > 1:
        raise invalid("prompt: holds texts and tokens together; give a list of the one or the other", "prompt")
    return [Prompt(text.encode_prompt(one), one) if isinstance(one, str) else _of_ids(text, one) for one in several]


def _of_ids(text: Text, ids: list[int]) -> Prompt:
    text.check_ids(ids, "prompt")
    return Prompt(ids, text.decode(ids))
