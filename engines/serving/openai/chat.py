"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from deepseek_trt.engines.generation.answer import Piece
from deepseek_trt.engines.serving.openai.answering import Answering, Delta, Question, ask, merged
from deepseek_trt.engines.serving.openai.bodies import ChatBody, StreamOptions
from deepseek_trt.engines.serving.openai.completions import check_stream
from deepseek_trt.engines.serving.openai.conversation import Conversation, converse
from deepseek_trt.engines.serving.openai.errors import invalid
from deepseek_trt.engines.serving.openai.guides import asking_param, naming_guide
from deepseek_trt.engines.serving.openai.logprobs import chat_logprobs
from deepseek_trt.engines.serving.openai.sampling import sampling_params, seeds_of
from deepseek_trt.engines.serving.openai.served import Served, usage
from deepseek_trt.engines.serving.openai.tool_use import ToolUse
from deepseek_trt.engines.text.parsing.said import CallPart, Parser, Said, whole_calls


@dataclass
class _Choice:
    """One answer as it is read."""

    parser: Parser
    parallel: bool
    finish: str | None = None
    calls: int = 0
    pieces: list[Piece] = field(default_factory=list)

    def read(self, delta: Delta) -> Said:
        said = self.parser.push(delta.text)
        if delta.finish:
            said += self.parser.flush()
        if not self.parallel:
            said = Said(said.content, said.reasoning, tuple(part for part in said.calls if part.index == 0))
        self.calls += len(said.calls)
        if delta.finish:
            self.finish = "tool_calls" if self.calls and delta.finish == "stop" else delta.finish
        return said


class Chat:
    """One request, taken by the engine: `whole` or `chunks`, once."""

    def __init__(self, served: Served, body: ChatBody, given: Conversation, taken: list[Answering]) -> None:
        assert served.text is not None
        self._taken, self._prompt_tokens = taken, len(given.ids)
        self._model = body.model or served.names[0]
        self._served, self._bytes_of = served, served.text.token_bytes
        self._logprobs = bool(body.logprobs)
        self._options = body.stream_options or StreamOptions()
        self._choices = [_Choice(given.parser(), given.use.parallel) for _ in taken]

    @classmethod
    async def ask(cls, served: Served, body: ChatBody) -> Chat:
        """Raises ApiError and RequestError, and then nothing has been taken."""
        text = served.text
        assert text is not None
        check_stream(body.stream, body.stream_options)
        count = 1 if body.n is None else body.n
        served.check_choices(count, "n")
        use, logprobs = ToolUse.of(body), _logprobs(body)
        given = await asyncio.to_thread(converse, served, body, use)
        room = max(served.max_model_len - len(given.ids), 1)
        params = sampling_params(body, served.defaults, room, logprobs, given.guide(body))
        questions = [Question(given.ids, own, body.timeout_ms, given.marks) for own in seeds_of(params, count)]
        with naming_guide("tools" if use.forced else asking_param(body, body.response_format)):
            return cls(served, body, given, await ask(served.engine, text, questions))

    def leave(self) -> None:
        for answer in self._taken:
            answer.leave()

    async def whole(self) -> dict[str, Any]:
        said = [Said() for _ in self._choices]
        async for index, delta in merged(self._taken):
            said[index] += self._choices[index].read(delta)
            self._choices[index].pieces += delta.pieces
        choices = [
            {
                "index": index,
                "message": _message(one),
                "logprobs": chat_logprobs(choice.pieces, self._bytes_of) if self._logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, (choice, one) in enumerate(zip(self._choices, said, strict=True))
        ]
        head = self._served.head("chat.completion", self._model, "chatcmpl")
        return {**head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        head = self._served.head("chat.completion.chunk", self._model, "chatcmpl")
        for index in range(len(self._choices)):
            yield self._chunk(head, index, {"role": "assistant", "content": ""})
        async for index, delta in merged(self._taken):
            said = self._choices[index].read(delta)
            logprobs = chat_logprobs(delta.pieces, self._bytes_of) if self._logprobs else None
            if said or delta.finish or logprobs:
                yield self._chunk(head, index, _delta(said), logprobs, self._choices[index].finish)
        if self._options.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _chunk(
        self, head: dict[str, Any], index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**head, "choices": [choice]}
        if self._options.continuous_usage_stats:
            return {**chunk, "usage": self._usage()}
        return {**chunk, "usage": None} if self._options.include_usage else chunk

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(answer.made for answer in self._taken))


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: needs logprobs true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["content"] = said.content or None
        calls = whole_calls(said.calls)
        message["tool_calls"] = [_call(None, call.name, call.arguments) for call in calls]
    return message


def _delta(said: Said) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if said.reasoning:
        delta["reasoning_content"] = said.reasoning
    if said.content:
        delta["content"] = said.content
    if said.calls:
        delta["tool_calls"] = [_call_delta(part) for part in said.calls]
    return delta


def _call_delta(part: CallPart) -> dict[str, Any]:
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return _call(part.index, part.name, part.arguments)


def _call(index: int | None, name: str, arguments: str) -> dict[str, Any]:
    call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
    function = {"name": name, "arguments": arguments}
    return {**({} if index is None else {"index": index}), **call, "function": function}
