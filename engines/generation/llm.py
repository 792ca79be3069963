"""LLM: text or tokens in, text and tokens out, over one bundle; all callers share one running batch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from deepseek_trt.engines.generation.generate import check_generates
from deepseek_trt.engines.generation.loop import EngineLoop, Ticket
from deepseek_trt.engines.generation.sampling import SamplingParams
from deepseek_trt.engines.generation.scheduler import Event, FinishReason, Scheduler, SchedulerLimits
from deepseek_trt.engines.generation.stops import StopText
from deepseek_trt.engines.generation.text import Text
from deepseek_trt.engines.sessions.backends import SessionRequest
from deepseek_trt.engines.sessions.opening import AUTO, CHOICES, Choice, open_session
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.folder import Bundle, Manifest
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.cpu.sampling_row import TopLogprobs, unpack

Prompt = str | Sequence[int]
ParamsOrMany = SamplingParams | Sequence[SamplingParams] | None
_MIB = 2**20


@dataclass(frozen=True)
class Piece:
    """One token of an answer and the text that can be shown with it, possibly none.

    logprob and top_logprobs (id, logprob), best first, are there where the request asked for them; likeliest are the
    latter, packed. finish_reason is "stop" (a stop token or a stop string) or "length" on the last piece, else None.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None
    logprob: float | None = None
    likeliest: bytes = b""

    @property
    def top_logprobs(self) -> TopLogprobs:
        return unpack(self.likeliest)


@dataclass(frozen=True)
class Result:
    """A whole answer. text is None where the bundle has no tokenizer.

    token_ids hold the stop token, and all tokens that a stop string was made of; text holds neither.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[TopLogprobs, ...] | None


class LLM:
    """A bundle ready to answer, for several threads and tasks at once.

    `generate` and `stream` compute in the caller's thread; `agenerate` and `astream` in one background thread, which
    starts with the first of them. Close it, or use it in a `with` statement.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        backend: str = AUTO,
        threads: int = 0,
        limits: SchedulerLimits | None = None,
        cache_mib: int = 1024,
        pages: int | None = None,
    ) -> None:
        """`pages` sets the cache's size, else `cache_mib` bounds it (in the bundle's dtype) where limits.max_running
        sequences of full length would take more. `choice` says which backend runs, and why.
        """
        if backend not in CHOICES:
            raise RequestError(f"backend {backend!r}: must be one of {', '.join(CHOICES)}")
        opened = Bundle.open(Path(bundle))
        check_generates(opened)
        limits = limits or SchedulerLimits()
        if pages is None:
            pages = _pages(opened.manifest, limits.max_running, cache_mib)
        started = open_session(SessionRequest(opened, pages, threads), backend)
        text = Text(opened) if opened.tokenizer_path else None
        self._set_up(started.session, opened.manifest.model, text, limits)
        self.choice = started.choice

    @classmethod
    def over(
        cls, session: Session, config: ModelConfig, text: Text | None = None, limits: SchedulerLimits | None = None
    ) -> LLM:
        """An LLM over a session that is there already; no one else may run it."""
        llm = cls.__new__(cls)
        llm._set_up(session, config, text, limits or SchedulerLimits())
        return llm

    def _set_up(self, session: Session, config: ModelConfig, text: Text | None, limits: SchedulerLimits) -> None:
        self.session, self.text = session, text
        self.choice = Choice(session.backend, "", "it was given")
        self.scheduler = Scheduler(session, config, limits)
        self._loop = EngineLoop(self.scheduler)
        self._closing = weakref.finalize(self, self._loop.close)

    def generate(self, prompts: Sequence[Prompt], params: ParamsOrMany = None) -> list[Result]:
        """Answers in order of the prompts. With one SamplingParams for all, prompt i samples with its seed + i.

        Raises RequestError, before anything is computed, for a prompt or parameter that the model cannot take.
        """
        requests = self._requests(prompts, params)
        pieces: list[list[Piece | Exception]] = [[] for _ in requests]
        tickets: list[Ticket] = []
        try:
            for (ids, own), mine in zip(requests, pieces, strict=True):
                tickets.append(self._submit(ids, own, mine.append))
            while not all(ticket.ended for ticket in tickets):
                self._loop.step(unless=lambda: all(ticket.ended for ticket in tickets))
        finally:
            self._drop(tickets)
        return [self._result(ids, map(_good, mine)) for (ids, _), mine in zip(requests, pieces, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The answer token by token. Leaving the iterator, or closing it, ends the request and frees its pages."""
        ((ids, own),) = self._requests([prompt], params)
        return self._pieces(ids, own)

    async def agenerate(self, prompts: Sequence[Prompt], params: ParamsOrMany = None) -> list[Result]:
        """`generate` without blocking the event loop; cancelling the task ends its requests."""
        requests = self._requests(prompts, params)
        return list(await asyncio.gather(*(self._acollect(ids, own) for ids, own in requests)))

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Piece, None]:
        """`stream` without blocking the event loop. Who leaves it early closes it: contextlib.aclosing."""
        ((ids, own),) = self._requests([prompt], params)
        async with contextlib.aclosing(self._apieces(ids, own)) as pieces:
            async for piece in pieces:
                yield piece

    def submit(self, prompt: Prompt, params: SamplingParams, put: Callable[[Event | Exception], None]) -> Ticket:
        """Hand the answer's events to `put` as they are made, or what went wrong, in the thread that `start` starts.

        That thread is kept from text: an Answer makes pieces of events elsewhere, and whoever finds a stop string there
        cancels the ticket. Raises RequestError for a prompt or parameter that the model cannot take.
        """
        ids = self._encode(prompt)
        self._check_stop(params)

        def deliver(event: Event | Exception) -> bool:
            put(event)
            return isinstance(event, Exception) or event.finished is not None

        return self._loop.submit(ids, params, deliver)

    def cancel(self, ticket: Ticket) -> None:
        """Free what the request holds before the next step; one that has ended is left as it is."""
        self._loop.cancel([ticket])

    def start(self, on_failure: Callable[[Exception], None] | None = None) -> None:
        """Step in the background thread; what a step raises goes to `on_failure` after it went to every request."""
        self._loop.start(on_failure)

    def close(self) -> None:
        """End the background thread; requests that have not ended get a BackendError. A second time does nothing."""
        self._closing()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _requests(self, prompts: Sequence[Prompt], params: ParamsOrMany) -> list[tuple[list[int], SamplingParams]]:
        if isinstance(prompts, str):
            raise RequestError(f"prompts {prompts!r}: give a list of prompts, or use stream for one")
        requests = list(zip(map(self._encode, prompts), _params_each(params, len(prompts)), strict=True))
        for index, (ids, own) in enumerate(requests):
            self.scheduler.check(ids, own, f"prompt {index}")
            self._check_stop(own)
        return requests

    def _check_stop(self, params: SamplingParams) -> None:
        if params.stop and self.text is None:
            raise RequestError(f"stop {params.stop!r}: the bundle has no tokenizer.json; use stop_token_ids")

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.text is None:
            raise RequestError(f"prompt {prompt[:40]!r}: the bundle has no tokenizer.json; give token ids")
        return self.text.encode(prompt)

    def _submit(self, ids: list[int], params: SamplingParams, put: Callable[[Piece | Exception], None]) -> Ticket:
        answer = Answer(self.text, params)

        def deliver(event: Event | Exception) -> bool:
            piece = answer.piece(event) if isinstance(event, Event) else event
            put(piece)
            return isinstance(piece, Exception) or piece.finish_reason is not None

        return self._loop.submit(ids, params, deliver)

    def _drop(self, tickets: list[Ticket]) -> None:
        """Free the pages of requests that have not ended, before this returns."""
        left = [ticket for ticket in tickets if not ticket.ended]
        if left:
            self._loop.cancel(left)
            self._loop.settle()

    def _pieces(self, ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        made: deque[Piece | Exception] = deque()
        ticket = self._submit(ids, params, made.append)
        try:
            while made or not ticket.ended:
                if made:
                    yield _good(made.popleft())
                else:
                    self._loop.step(unless=lambda: bool(made))
        finally:
            self._drop([ticket])

    async def _apieces(self, ids: list[int], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        here = asyncio.get_running_loop()
        made: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def put(piece: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it whoever waited
                here.call_soon_threadsafe(made.put_nowait, piece)

        self._loop.start()
        ticket = self._submit(ids, params, put)
        try:
            while True:
                piece = _good(await made.get())
                yield piece
                if piece.finish_reason:
                    return
        finally:
            self._loop.cancel([ticket])

    async def _acollect(self, ids: list[int], params: SamplingParams) -> Result:
        async with contextlib.aclosing(self._apieces(ids, params)) as pieces:
            return self._result(ids, iter([piece async for piece in pieces]))

    def _result(self, ids: list[int], pieces: Iterator[Piece]) -> Result:
        made = tuple(pieces)
        reason = made[-1].finish_reason
        assert reason is not None
        logprobs = tuple(p.logprob for p in made if p.logprob is not None)
        return Result(
            prompt_ids=tuple(ids),
            token_ids=tuple(p.token_id for p in made),
            text="".join(p.text for p in made) if self.text else None,
            finish_reason=reason,
            logprobs=logprobs or None,
            top_logprobs=tuple(p.top_logprobs for p in made) if logprobs else None,
        )


class Answer:
    """Turns a request's events into pieces, with text up to the first stop."""

    def __init__(self, text: Text | None, params: SamplingParams) -> None:
        self._stream = text.stream() if text else None
        self._stops = StopText(params.stop)
        self._min_tokens = params.min_tokens
        self._made = 0

    def piece(self, event: Event) -> Piece | Exception:
        """The event's piece, or the error of a tokenizer that cannot decode: this request's, not the batch's."""
        try:
            return self._piece(event)
        except Exception as error:  # tokenizers raises bare ones
            return error

    def _piece(self, event: Event) -> Piece:
        self._made += 1
        text, finished = "", event.finished
        if self._stream and finished != "stop":  # a stop token has no text
            text = self._stops.push(self._stream.push(event.token), armed=self._made >= self._min_tokens)
        if self._stops.found:
            finished = "stop"
        elif finished:
            text += self._stops.flush()
        return Piece(text, event.token, finished, event.logprob, event.likeliest)


def _good(piece: Piece | Exception) -> Piece:
    if isinstance(piece, Exception):
        raise piece
    return piece


def _params_each(params: ParamsOrMany, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        one = params or SamplingParams()
        return [dataclasses.replace(one, seed=one.seed + index) for index in range(count)]
    if len(params) != count:
        raise RequestError(f"{len(params)} SamplingParams for {count} prompts: give one, or one for each prompt")
    return list(params)


def _pages(manifest: Manifest, sequences: int, cache_mib: int) -> int:
    """Pages for `sequences` of full length, as far as they fit into cache_mib, and the scratch page."""
    cache = manifest.cache
    full = sequences * cache.pages_for(manifest.model.max_position_embeddings)
    fitting = cache_mib * _MIB // (cache.bytes_per_token * cache.page_size) - 1
    if fitting < 1:
        raise RequestError(f"cache_mib {cache_mib}: does not hold one page beside the scratch page; raise it")
    return 1 + min(full, fitting)
