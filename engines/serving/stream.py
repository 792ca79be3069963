"""Stream: one request that is being answered, between the thread that computes and the thread that sends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from deepseek_trt.engines.generation.answer import Answer, Piece
from deepseek_trt.engines.generation.loop import Ticket
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.engines.serving.request import GenerateRequest

FailureKind = Literal["invalid", "refused", "cancelled", "timeout", "failed"]
LeftReason = Literal["satisfied", "gone"]


@dataclass(frozen=True)
class Response:
    """One response; num_output_tokens, logprobs and pieces are of the tokens since the response before.

    finish_reason is "stop" or "length" on the last response, else empty. pieces are there for requests of tokens alone.
    unwanted: outputs that the request left out.
    """

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    logprobs: tuple[float, ...] | None
    cum_logprob: float | None
    pieces: tuple[Piece, ...] = ()
    unwanted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Failure:
    """An answer that does not come, or does not go on. full: there was no room for the request; there may be later."""

    kind: FailureKind
    message: str
    full: bool = False


class Channel(Protocol):
    """The way back to whoever asked."""

    def send(self, response: Response | Failure | None, final: bool) -> None:
        """After the final one nothing can be sent."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


class Stream:
    """One request with its answer so far. The computing thread calls `put`, the sending thread all else, text too."""

    def __init__(self, channel: Channel, request: GenerateRequest, answer: Answer, arrived: float) -> None:
        self.channel, self.request, self._answer = channel, request, answer
        self.ticket: Ticket | None = None  # once the request is submitted
        self.queued = False  # whether the sending thread has been told of what is in _events
        self.polled = self.arrived = arrived
        self.deadline = arrived + request.timeout_ms / 1000 if request.timeout_ms else None
        self.first_token: float | None = None
        self.last_token = arrived
        self.made = 0  # tokens that were taken
        self.left: LeftReason | None = None  # why nobody wants more of the answer
        self._used = 0  # tokens that were wanted of an answer that was left
        self._events: deque[Event | Exception] = deque()
        self._text = [request.echo] if request.echo else []
        self._pieces: list[Piece] = []
        self._logprobs: list[float] = []
        self._cum_logprob = 0.0
        self._unsent = 0  # tokens taken since the response before

    def put(self, event: Event | Exception) -> None:
        self._events.append(event)

    def leave(self, used: int | None) -> None:
        """Nobody wants more: `used` tokens were enough, or None where nobody waits any more. Any thread may call it."""
        self._used = used or 0
        self.left = "gone" if used is None else "satisfied"

    def end(self) -> Response | Failure:
        """What becomes of an answer that was left: the rest is nobody's."""
        if self.left == "satisfied":
            self.made = self._used
            return self._response("stop")
        return Failure("cancelled", f"the request was cancelled after {self.made} tokens")

    def take(self) -> Response | Failure | None:
        """Everything that was put since, as the response to send now; None where there is none to send yet."""
        pieces, error = self._popped()
        self._note(pieces)
        if error is not None:
            return Failure("failed", f"after {self.made} tokens: {error}")
        finish_reason = pieces[-1].finish_reason if pieces else None
        unsent = self._pieces if self.request.tokens_alone else self._text
        if not finish_reason and not (self.request.stream and unsent):
            return None
        return self._response(finish_reason or "")

    def _popped(self) -> tuple[list[Piece], Exception | None]:
        """Pieces up to the last of the answer: the engine may be a few tokens beyond a stop string."""
        pieces: list[Piece] = []
        while self._events and not (pieces and pieces[-1].finish_reason):
            event = self._events.popleft()
            piece = self._answer.piece(event) if isinstance(event, Event) else event
            if isinstance(piece, Exception):
                return pieces, piece
            pieces.append(piece)
        return pieces, None

    def _note(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        self.made += len(pieces)
        self._unsent += len(pieces)
        self._text += [piece.text for piece in pieces if piece.text]
        if self.request.tokens_alone:
            self._pieces += pieces
        if self.request.params.logprobs is not None:
            self._logprobs += [piece.logprob for piece in pieces if piece.logprob is not None]

    def _response(self, finish_reason: str) -> Response:
        wanted = self.request.params.logprobs is not None
        self._cum_logprob += sum(self._logprobs)
        response = Response(
            text="".join(self._text),
            finish_reason=finish_reason,
            num_input_tokens=len(self.request.prompt_ids),
            num_output_tokens=self._unsent,
            logprobs=tuple(self._logprobs) if wanted else None,
            cum_logprob=self._cum_logprob if wanted else None,
            pieces=tuple(self._pieces),
            unwanted=self.request.unwanted,
        )
        self._text, self._pieces, self._logprobs, self._unsent = [], [], [], 0
        return response
