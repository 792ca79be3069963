"""LLM: text or tokens in, text and tokens out, over one bundle; all callers share one running batch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import operator
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_trt.engines.generation.answer import Answer, Piece, Result
from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.drafting.drafter import check_drafts
from deepseek_trt.engines.generation.guiding import Guides
from deepseek_trt.engines.generation.loop import EngineLoop, Ticket
from deepseek_trt.engines.generation.pages import pages_needed, pages_within
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.sessions.opening import (
    AUTO,
    Choice,
    SessionRequest,
    check_backend,
    check_generates,
    open_session,
)
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.engines.text.messages import Message
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle, Manifest
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import RequestError

Prompt = str | Sequence[int]
ParamsOrMany = SamplingParams | Sequence[SamplingParams] | None
_NO_DEFAULTS = SamplingDefaults()


class LLM:
    """A bundle ready to answer, for several threads and tasks at once.

    `generate` and `stream` compute in the caller's thread; `agenerate` and `astream` in one background thread, which
    starts with the first of them. Close it, or use it in a `with` statement.
    """

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        text: Text | None = None,
        limits: SchedulerLimits | None = None,
        choice: Choice | None = None,
        defaults: SamplingDefaults = _NO_DEFAULTS,
    ) -> None:
        """Over a session that no one else may run; `choice` says which backend that is, and why.

        `defaults` are for who gives no SamplingParams; defaults.params(max_new_tokens=64) are they with a change.
        """
        self.session, self.config, self.text, self.defaults = session, config, text, defaults
        self.choice = choice or Choice(session.backend, "it was given")
        guides = Guides(text, config.vocab_size, config.eos_token_ids) if text else None
        self.scheduler = Scheduler(session, config, limits, guides)
        self._loop = EngineLoop(self.scheduler)
        self._closing = weakref.finalize(self, self._loop.close)

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        backend: str = AUTO,
        threads: int = 0,
        limits: SchedulerLimits | None = None,
        speculate: str | None = None,
        cache_mib: int = 1024,
        pages: int | None = None,
        generation_config: bool = True,
        verify: bool = False,
    ) -> LLM:
        """The bundle at this path, with a session of its own.

        Its generation_config.json gives `defaults`, unless generation_config is False: then they are greedy.
        `speculate` stands in for limits.speculate.

        `pages` sets the cache's size, else `cache_mib` bounds it (in the bundle's dtype) where limits.max_running
        sequences of full length would take more. `verify` hashes all files of the bundle, the weights among them, which
        are otherwise hashed once and again when they change.
        """
        check_backend(backend)
        limits = limits or SchedulerLimits()
        limits = limits if speculate is None else dataclasses.replace(limits, speculate=speculate)
        found = Bundle.open(Path(bundle), verify)
        check_generates(found)
        check_drafts(found, limits.speculate)
        defaults = SamplingDefaults.of_bundle(found) if generation_config else _NO_DEFAULTS
        if pages is None:
            pages = _pages(found.manifest, limits.max_running, cache_mib)
        opened = open_session(SessionRequest(found, pages, threads), backend)
        text = Text(found) if found.tokenizer_path else None
        return cls(opened.session, found.manifest.model, text, limits, opened.choice, defaults)

    def generate(
        self, prompts: Sequence[Prompt], params: ParamsOrMany = None, on_token: Callable[[], None] = lambda: None
    ) -> list[Result]:
        """Answers in order of the prompts. With one SamplingParams for all, prompt i samples with its seed + i.

        SamplingParams are complete; where none are given, `defaults` decide. `on_token` is called after every token of
        any of them; what it raises is raised here, and other callers' answers go on.

        Raises RequestError, before anything is computed, for a prompt or parameter that the model cannot take.
        """
        requests = self._requests(prompts, params)
        pieces: list[list[Piece | Exception]] = [[] for _ in requests]
        tickets: list[Ticket] = []
        try:
            for (ids, own), mine in zip(requests, pieces, strict=True):
                tickets.append(self._submit(ids, own, _keeper(mine, on_token)))
            while not _over(tickets):
                self._loop.step(unless=lambda: _over(tickets))
        finally:
            self._drop(tickets)
        return [
            Result.of(ids, map(_good, mine), self.text is not None)
            for (ids, _), mine in zip(requests, pieces, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        **arguments: Any,
    ) -> Result:
        """The answer to a conversation, by the checkpoint's chat template; Text.encode_chat takes tools and arguments.

        Raises RequestError where there is no template, or where it refuses the messages.
        """
        if self.text is None:
            raise RequestError("the bundle has no tokenizer.json, so that there is no chat: give token ids to generate")
        return self.generate([self.text.encode_chat(messages, tools, **arguments)], params)[0]

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
        cancels the ticket. What `put` raises ends this request alone, and is the ticket's `error`. Raises RequestError
        for a prompt or parameter that the model cannot take.
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

    @property
    def beats(self) -> int:
        """Steps of the background thread, and seconds that it was idle: it has stopped where they stand still."""
        return self._loop.beats

    def close(self) -> None:
        """End the background thread; requests that have not ended get a BackendError. A second time does nothing."""
        self._closing()

    def __repr__(self) -> str:
        cache = f"{self.session.pages} cache pages"
        return f"LLM({self.choice.backend}, {self.scheduler.running} requests running, {cache})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _requests(self, prompts: Sequence[Prompt], params: ParamsOrMany) -> list[tuple[list[int], SamplingParams]]:
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise RequestError(f"prompts {repr(prompts)[:80]}: give a list of prompts, or use stream for one")
        if isinstance(prompts, (str, bytes)):
            raise RequestError(f"prompts {prompts[:40]!r}: give a list of prompts, [prompt] for one")
        prompts = list(prompts)
        requests = list(zip(map(self._encode, prompts), self._params_each(params, len(prompts)), strict=True))
        for index, (ids, own) in enumerate(requests):
            self.scheduler.check(ids, own, f"prompt {index}")
            self._check_stop(own)
        return requests

    def _params_each(self, params: ParamsOrMany, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            one = params or self.defaults.params()
            return [dataclasses.replace(one, seed=(one.seed + index) % 2**64) for index in range(count)]
        if not isinstance(params, Sequence) or not all(isinstance(own, SamplingParams) for own in params):
            raise RequestError(
                f"params {repr(params)[:80]}: give SamplingParams, or a list of them, one for each prompt"
            )
        if len(params) != count:
            raise RequestError(f"{len(params)} SamplingParams for {count} prompts: give one, or one for each prompt")
        return list(params)

    def _check_stop(self, params: SamplingParams) -> None:
        if params.stop and self.text is None:
            raise RequestError(f"stop {params.stop!r}: the bundle has no tokenizer.json; use stop_token_ids")

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _token_ids(prompt)
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
            return Result.of(ids, [piece async for piece in pieces], self.text is not None)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        if isinstance(prompt, (bytes, bytearray, memoryview, dict, set)) or any(isinstance(t, bool) for t in prompt):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        shown = f"{type(prompt).__name__} of {len(prompt)}" if hasattr(prompt, "__len__") else type(prompt).__name__
        raise RequestError(f"prompt (a {shown}): give text, or a list of token ids") from None


def _over(tickets: Sequence[Ticket]) -> bool:
    """Whether all have ended; raises what a callback of theirs raised."""
    for ticket in tickets:
        if ticket.error is not None:
            raise ticket.error
    return all(ticket.ended for ticket in tickets)


def _keeper(pieces: list[Piece | Exception], on_token: Callable[[], None]) -> Callable[[Piece | Exception], None]:
    def keep(piece: Piece | Exception) -> None:
        pieces.append(piece)
        on_token()

    return keep


def _good(piece: Piece | Exception) -> Piece:
    if isinstance(piece, Exception):
        raise piece
    return piece


def _pages(manifest: Manifest, sequences: int, cache_mib: int) -> int:
    """Pages for `sequences` of full length, as far as they fit into cache_mib."""
    fitting = pages_within(manifest.cache, cache_mib)
    if fitting < 2:
        raise RequestError(f"cache_mib {cache_mib}: does not hold one page beside the scratch page; raise it")
    return min(fitting, pages_needed(manifest.cache, [manifest.model.max_position_embeddings] * sequences))
