"""The two APIs that benchmarks/server.py asks by: what a call looks like, what is malformed, how that is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server_client import Call

MakeCall = Callable[[str, int, bool, float], Call]  # prompt, tokens, streamed, temperature


@dataclass(frozen=True)
class Api:
    """calls: the ways to ask for an answer of so many tokens. refusals: statuses of what is malformed."""

    calls: tuple[MakeCall, ...]
    malformed: tuple[Call, ...]
    refusals: tuple[int, ...]


def _generate(prompt: str, tokens: int, stream: bool, temperature: float) -> Call:
    path = f"/v2/models/deepseek_v2/generate{'_stream' * stream}"
    given = {"text_input": prompt, "stream": stream, "max_tokens": tokens, "min_tokens": tokens}
    return Call(path, {**given, "temperature": temperature})


def _openai(tokens: int, stream: bool, temperature: float) -> dict[str, Any]:
    given = {"max_tokens": tokens, "min_tokens": tokens, "temperature": temperature}
    return {**given, "stream": True, "stream_options": {"include_usage": True}} if stream else given


def _complete(prompt: str, tokens: int, stream: bool, temperature: float) -> Call:
    return Call("/v1/completions", {"prompt": prompt, **_openai(tokens, stream, temperature)})


def _chat(prompt: str, tokens: int, stream: bool, temperature: float) -> Call:
    messages = [{"role": "user", "content": prompt}]
    return Call("/v1/chat/completions", {"messages": messages, **_openai(tokens, stream, temperature)})


_WRONG: tuple[dict[str, Any], ...] = (
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": -2.0},
    {"unknown": 1},
)
TRITON = Api(
    calls=(_generate,),
    malformed=tuple(
        Call("/v2/models/deepseek_v2/generate_stream", {"stream": True, **body})
        for body in (
            {"max_tokens": 4},
            {"text_input": ""},
            {"text_input": "word " * 5000},
            *({"text_input": "The", **wrong} for wrong in _WRONG),
        )
    ),
    refusals=(400, 500),  # 500 is tritonserver's own
)
SERVE = Api(
    calls=(_complete, _chat),
    malformed=(
        Call("/v1/completions", {"max_tokens": 4}),
        Call("/v1/completions", {"prompt": []}),
        Call("/v1/completions", {"prompt": "word " * 5000, "stream": True}),
        Call("/v1/completions", {"prompt": "The", "suffix": "end"}),
        Call("/v1/chat/completions", {"messages": []}),
        Call("/v1/nothing", {}),
        *(Call("/v1/completions", {"prompt": "The", **wrong}) for wrong in _WRONG),
    ),
    refusals=(400, 404, 422),
)
