"""What server and engine tell each other, as MessagePack: ids name requests, and are the server's choice."""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all; arrays on the wire, so that names cost nothing."""


class Setup(Message, frozen=True):
    """The first message to an engine: the bundle's folder, and its ServingSettings by name."""

    bundle: str
    settings: dict[str, Any]


class Start(Message, frozen=True):
    """Answer these tokens; params are SamplingParams' fields but for stop, which the server looks for itself.

    Of a guide they hold kind, text and after.
    """

    id: int
    prompt_ids: list[int]
    params: dict[str, Any]
    timeout_ms: int | None = None


class Leave(Message, frozen=True):
    """Nothing more is wanted of this answer. used: how many of its tokens were, None where nobody waits any more."""

    id: int
    used: int | None


class Embed(Message, frozen=True):
    """The vectors of these rows of tokens."""

    id: int
    rows: list[list[int]]


class AskMetrics(Message, frozen=True):
    """The metrics as they are."""

    id: int


class Drain(Message, frozen=True):
    """Take nothing more, and say when the last answer has ended."""


class Ready(Message, frozen=True):
    """The engine has computed once. lines: what people should know of it."""

    lines: list[str]


class Taken(Message, frozen=True):
    """The request was admitted."""

    id: int


class Tokens(Message, frozen=True):
    """Tokens since the message before; logprobs and likeliest (packed, see sampling_row) where they were asked for.

    finish: "stop" or "length" with the last, else empty.
    """

    id: int
    tokens: list[int]
    finish: str
    logprobs: list[float] | None = None
    likeliest: list[bytes] | None = None


class Failed(Message, frozen=True):
    """A FailureKind and a sentence; full: there was no room for the request, which may be there later."""

    id: int
    kind: str
    message: str
    full: bool = False


class Vectors(Message, frozen=True):
    """A row's float32 numbers as bytes, a row a text."""

    id: int
    rows: list[bytes]


class Shown(Message, frozen=True):
    """Metrics as (name, label, value), and of histograms as (name, counts up to each bucket and in all, sum)."""

    id: int
    values: list[tuple[str, str, float]]
    histograms: list[tuple[str, list[int], float]]


class Down(Message, frozen=True):
    """The engine takes nothing any more, for a reason that somebody should mend."""

    reason: str


class Drained(Message, frozen=True):
    """Every request has had its end."""


ToEngine = Setup | Start | Leave | Embed | AskMetrics | Drain
ToServer = Ready | Taken | Tokens | Failed | Vectors | Shown | Down | Drained
