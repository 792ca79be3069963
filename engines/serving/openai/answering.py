"""Answers: tokens from the engine as text, for one choice or for several at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from deepseek_trt.engines.generation.answer import Answer, Piece
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.request import Event, FinishReason
from deepseek_trt.engines.serving.openai.errors import ApiError, failed
from deepseek_trt.engines.serving.openai.sampling import wire_params
from deepseek_trt.engines.serving.process.client import Asked, EngineClient
from deepseek_trt.engines.serving.process.messages import Failed, Taken, Tokens
from deepseek_trt.engines.text.text import Text


@dataclass(frozen=True)
class Question:
    """Tokens to answer and how; shown are special tokens whose text is wanted."""

    prompt_ids: list[int]
    params: SamplingParams
    timeout_ms: int | None = None
    shown: Container[str] = ()


@dataclass(frozen=True)
class Delta:
    """What has come since the delta before: all that waited at once. finish is there with the last."""

    pieces: tuple[Piece, ...]
    finish: FinishReason | None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class Answering:
    """One question that the engine has taken."""

    def __init__(self, asked: Asked, text: Text, question: Question) -> None:
        self._asked, self._answer = asked, Answer(text, question.params, question.shown)
        self.question = question
        self.made = 0  # tokens, the stop token and those of a stop string among them

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield what comes, to the end; who closes this early ends the answer. Raises ApiError."""
        finish: FinishReason | None = None
        try:
            while not finish:
                come = [await self._asked.next(), *self._asked.waiting()]
                pieces = self._pieces(come)
                if pieces:
                    finish = pieces[-1].finish_reason
                    yield Delta(tuple(pieces), finish)
        finally:
            self._asked.leave(self.made if finish else None)

    def leave(self) -> None:
        self._asked.leave(None)

    def _pieces(self, come: Sequence[object]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in come:
            if isinstance(message, Failed):
                raise failed(message)
            if isinstance(message, Tokens):
                for event in _events(message):
                    pieces.append(self._piece(event))
                    if pieces[-1].finish_reason:
                        return pieces
        return pieces

    def _piece(self, event: Event) -> Piece:
        piece = self._answer.piece(event)
        if isinstance(piece, Exception):
            raise ApiError(500, f"the tokenizer cannot decode token {event.token}: {piece}", None, "failed")
        self.made += 1
        return piece


async def ask(engine: EngineClient, text: Text, questions: Sequence[Question]) -> list[Answering]:
    """Have all questions taken, or none: ApiError where the engine refuses one."""
    asked = [engine.generate(q.prompt_ids, wire_params(q.params), q.timeout_ms) for q in questions]
    try:
        for one in asked:
            message = await one.next()
            if isinstance(message, Failed):
                raise failed(message)
            assert isinstance(message, Taken)
    except BaseException:
        for one in asked:
            one.leave(None)
        raise
    return [Answering(one, text, question) for one, question in zip(asked, questions, strict=True)]


async def merged(answers: Sequence[Answering]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield the deltas of all as they come, with the answer's place. Raises ApiError; none goes on after this ends."""
    if len(answers) == 1:
        async with aclosing(answers[0].deltas()) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    come: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pour(index, answer, come)) for index, answer in enumerate(answers)]
    left = len(tasks)
    try:
        while left:
            index, come_now = await come.get()
            if isinstance(come_now, BaseException):
                raise come_now
            if come_now is None:
                left -= 1
            else:
                yield index, come_now
    finally:
        for task, answer in zip(tasks, answers, strict=True):
            task.cancel()
            answer.leave()


async def _pour(index: int, answer: Answering, into: asyncio.Queue[tuple[int, Delta | BaseException | None]]) -> None:
    try:
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                into.put_nowait((index, delta))
        into.put_nowait((index, None))
    except Exception as error:
        into.put_nowait((index, error))


def _events(message: Tokens) -> list[Event]:
    """Events as the scheduler made them; the request's number is of no use here."""
    last = len(message.tokens) - 1
    finish: FinishReason | None = message.finish or None  # type: ignore[assignment]
    logprobs, likeliest = message.logprobs, message.likeliest
    return [
        Event(
            0,
            token,
            finish if index == last else None,
            logprobs[index] if logprobs else None,
            likeliest[index] if likeliest else b"",
        )
        for index, token in enumerate(message.tokens)
    ]
