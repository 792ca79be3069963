"""Scheduler: many requests over one Session; they join and leave the running batch at every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_trt.engines.generation.batching.decode_rows import DecodeRows
from deepseek_trt.engines.generation.batching.limits import Counters, SchedulerLimits
from deepseek_trt.engines.generation.batching.steps import Steps
from deepseek_trt.engines.generation.chunking.chunks import Chunks
from deepseek_trt.engines.generation.chunking.cost import PrefillCost
from deepseek_trt.engines.generation.drafting.drafter import drafter_of
from deepseek_trt.engines.generation.guiding import Guides, RowGuide
from deepseek_trt.engines.generation.pages import PagePool, sequence_pages
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.prefix import PrefixKeys
from deepseek_trt.engines.generation.request import Event, Request, Work
from deepseek_trt.engines.generation.sampling import Choice, Picking, Sampler
from deepseek_trt.engines.generation.speculation import AUTO, Payoff
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Floats, Int32s
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import BackendError, RequestError
from deepseek_trt.plugins.cpu.sampler import load_sampler
from deepseek_trt.plugins.cpu.sampling_row import NOT_FINITE


class Scheduler:
    """Continuous batching by pages. Not for several threads at once.

    Requests are admitted in order of arrival when their tokens have pages and one more is left for each that runs and
    may grow. When a running request finds no page, the latest arrival is put back to the front of the queue; its
    tokens are kept and computed again. The earliest is never put back, so every request ends.
    """

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        limits: SchedulerLimits | None = None,
        guides: Guides | None = None,
    ) -> None:
        """`guides` compiles guides, which take a tokenizer; without it requests with one are refused."""
        self._guides = guides
        self.limits = (limits or SchedulerLimits()).on(session.chunk)
        self.counters = Counters()
        self.pool = PagePool(session.pages)
        self._session, self._config = session, config
        self._payoff = Payoff()
        sizes = self.limits.prefill_chunk, self.limits.token_budget, session.cache.page_size
        self._chunks = Chunks(PrefillCost.of_model(config), *sizes)
        native = load_sampler(session.library, session.threads) if session.library else None
        self._drafter = drafter_of(self.limits.speculate, session)
        self._steps = Steps(session, config.vocab_size, self._drafter)
        self._picking = Picking(native, self._steps.holding)
        self._waiting: deque[Request] = deque()
        self._rows: DecodeRows | None = None  # those that decoded in the last step, as it left them
        self._running: list[Request] = []  # in order of arrival, all earlier than those waiting
        self._next_id = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, prompt: Sequence[int], params: SamplingParams, name: str = "the prompt") -> int:
        """Queue a request and return its id. Raises RequestError, which calls the prompt `name`, where `check` does."""
        return self.queue(self.prepare(prompt, params, name))

    def prepare(self, prompt: Sequence[int], params: SamplingParams, name: str = "the prompt") -> Request:
        """All that a request's own values decide, checked and allocated, for any thread; `queue` takes it from there.

        Raises RequestError, which calls the prompt `name`, where `check` does.
        """
        self.check(prompt, params, name)
        tokens = list(prompt)
        free = params.ignore_eos and params.guide is None  # a guide says itself where the answer may end
        stops = frozenset(params.stop_token_ids) | frozenset(() if free else self._config.eos_token_ids)
        limit, most = self._limit(prompt, params), self._most_pages(prompt, params)
        sampler = Sampler(params, tokens, sorted(stops), room=limit, guide=self._guide(params))
        keys = PrefixKeys(self._session.cache.page_size)
        return Request(tokens, sampler, limit, most, stops, keys)

    def _guide(self, params: SamplingParams) -> RowGuide | None:
        if params.guide is None:
            return None
        if self._guides is None:
            raise RequestError("guide: the bundle has no tokenizer.json, by whose tokens answers are guided")
        return self._guides.compiled(params.guide)

    def queue(self, request: Request) -> int:
        """Queue what `prepare` made, and return its id."""
        request.id = self._next_id
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def check(self, prompt: Sequence[int], params: SamplingParams, name: str = "the prompt") -> None:
        """RequestError for an empty prompt, an unknown token id, and a prompt too long for the model or the pool."""
        vocab, longest = self._config.vocab_size, self._config.max_position_embeddings - 1
        if not prompt:
            raise RequestError(f"{name} is empty: give at least one token")
        if not all(0 <= token < vocab for token in prompt):
            raise RequestError(f"{name} holds a token id outside 0..{vocab - 1}")
        biased = [token for token, _ in params.logit_bias if token >= vocab]
        if biased:
            raise RequestError(f"logit_bias {biased[:8]}: the model's token ids end at {vocab - 1}")
        unknown = [token for token in params.stop_token_ids if token >= vocab]
        if unknown:
            raise RequestError(f"stop_token_ids {unknown}: the model's token ids end at {vocab - 1}")
        if len(prompt) > longest:
            raise RequestError(f"{name} has {len(prompt)} tokens; the model takes at most {longest}")
        pages = self._most_pages(prompt, params)
        if pages > self.pool.pages - 1:
            raise RequestError(
                f"{name} has {len(prompt)} tokens and may get {self._limit(prompt, params)}: {pages} cache pages, but "
                f"there are {self.pool.pages - 1}; give the session more pages or lower max_new_tokens"
            )

    def cancel(self, request: int) -> bool:
        """Drop a request and free its pages at once; False when it has ended already."""
        for queue in (self._running, self._waiting):
            for candidate in queue:
                if candidate.id == request:
                    self._rows = None
                    self._vacate(candidate)
                    queue.remove(candidate)
                    return True
        return False

    def step(self) -> list[Event]:
        """Compute one step: the next token of every decoding request, and prefill within the budget.

        Events come in order of arrival, one a request, and then those of tokens that were drafted; one whose logits are
        not finite ends with an error, and the others go on. When the session raises, no request has moved, and the step
        can be tried again.
        """
        if self._drafter is not None:
            self._drafter.catch_up(self._running)
        rows, self._rows = self._rows, None
        if not (rows and rows.requests == self._running and rows.grow(self.pool)):
            rows = None
            self._grow()
        self._admit()
        if rows and len(rows.requests) == len(self._running):
            return self._decode_rows(rows)
        decoding = [Work(request, 1) for request in self._running if request.decodes]
        if len(decoding) == len(self._running):
            if self._drafter is not None:
                return self._decode_all(decoding)
            return self._decode_rows(DecodeRows(self._running, self._session.cache.page_size)) if decoding else []
        prefilling = self._chunks.of(self._running)
        prefilled, decoded = self._steps.prefill(prefilling), self._steps.decode(decoding)
        self._advance(prefilling, decoding)
        work = zip([*prefilling, *decoding], [*prefilled, *(row[0] for row in decoded)], strict=True)
        logits = {w.request.id: row for w, row in work}
        ready = [request for request in self._running if request.id in logits and not request.left]
        return self._sample(ready, [logits[request.id] for request in ready])

    def _decode_rows(self, rows: DecodeRows) -> list[Event]:
        """A step without prefill or drafts, whose rows are kept for the next one while none joins or leaves."""
        logits = self._steps.decode_rows(rows)
        full = rows.advance()
        if self.limits.prefix_reuse:
            for request in full:
                self._name_full_pages(request)
        self.counters.decoded += len(rows.requests)
        choices = self._choices(rows.requests, logits)
        events = rows.go_on(choices)
        if events is None:
            return self._take_choices(rows.requests, choices)
        self._rows = rows
        return events

    def _decode_all(self, decoding: list[Work]) -> list[Event]:
        """A step without prefill: the tokens that every row's logits give, as far as they are what was drafted."""
        if not decoding:
            return []
        start = self._payoff.clock()
        try:
            work = self._with_drafts(decoding)
            logits = self._steps.decode(work)
        except BaseException:
            for w in decoding:
                self._cut(w.request)
            raise
        self.counters.drafted += sum(len(w.draft) for w in work)
        seconds = self._payoff.clock() - start
        self._advance([], work)
        first: Any = np.ascontiguousarray(logits[:, 0])
        events = latest = self._sample([w.request for w in work], first)
        if self._steps.holding:  # whose step was not over before
            seconds = self._payoff.clock() - start
        going, at = [row for row, w in enumerate(work) if w.draft], 0
        if not going:
            self._payoff.plain(len(work), seconds)
            return events
        while going := _agreeing(work, going, at, latest):
            at += 1
            for row in going:
                self._take(work[row].request, 1)
            self.counters.accepted += len(going)
            self.counters.decoded += len(going)
            latest = self._sample([work[row].request for row in going], logits[going, at])
            events += latest
        for w in work:
            self._cut(w.request)
        self._payoff.drafted(len(work), len(events), seconds)
        return events

    def _with_drafts(self, work: list[Work]) -> list[Work]:
        """The rows with what may come after their next tokens, within the budget and where pages are free."""
        rests = self.limits.speculate == AUTO and not self._payoff.wants(len(work))
        if rests or self._drafter is None:
            return work
        return self._drafter.propose(work, self.limits.token_budget - len(work), self._reach)

    def _reach(self, request: Request, more: int) -> int:
        """For how many of so many tokens after its next one the request has pages: free ones are taken for them."""
        missing = self._session.cache.pages_for(len(request.tokens) + more) - len(request.pages)
        if missing > 0:
            request.pages += self.pool.take(min(missing, self.pool.free))
        return len(request.pages) * self._session.cache.page_size - len(request.tokens)

    def _cut(self, request: Request) -> None:
        """Give back pages behind what is cached: they held drafts that were not picked."""
        held = self._session.cache.pages_for(request.cached)
        self.pool.give_back(request.pages[held:])
        del request.pages[held:]

    def _limit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        return min(params.max_new_tokens, self._config.max_position_embeddings - len(prompt))

    def _most_pages(self, prompt: Sequence[int], params: SamplingParams) -> int:
        return sequence_pages(self._session.cache, len(prompt) + self._limit(prompt, params))

    def _grow(self) -> None:
        """A page for the next token of every decoding request, from the latest arrival where none is free."""
        for request in tuple(self._running):
            if self._session.cache.pages_for(len(request.tokens)) <= len(request.pages) or not request.decodes:
                continue
            while request.pages and not self.pool.free:
                self._preempt(self._running[-1])
            if request.pages:
                request.pages += self.pool.take(1)

    def _preempt(self, request: Request) -> None:
        self._vacate(request)
        self._running.remove(request)
        self._waiting.appendleft(request)
        self.counters.preemptions += 1

    def _vacate(self, request: Request) -> None:
        self.pool.give_back(request.pages)
        request.pages, request.cached, request.named = [], 0, 0
        request.states.restart(0)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.max_running:
            request = self._waiting[0]
            shared = self._shareable(request)
            missing = self._session.cache.pages_for(len(request.tokens)) - len(shared)
            reserve = sum(len(running.pages) < running.most_pages for running in self._running)
            if self.pool.free - self.pool.unowned(shared) < missing + reserve:
                return
            self.pool.share(shared)
            request.pages = shared + self.pool.take(missing)
            request.named = len(shared)
            request.cached = len(shared) * self._session.cache.page_size
            request.states.restart(request.cached)
            self.counters.reused += request.cached
            self._running.append(self._waiting.popleft())

    def _shareable(self, request: Request) -> list[int]:
        """Known pages of the request's tokens; the last token is computed in any case, as its logits are needed."""
        if not self.limits.prefix_reuse:
            return []
        full = (len(request.tokens) - 1) // self._session.cache.page_size
        return self.pool.find(request.keys.of(request.tokens, full))

    def _advance(self, prefilling: list[Work], decoding: list[Work]) -> None:
        self.counters.prefilled += sum(w.new for w in prefilling)
        self.counters.decoded += len(decoding)
        for w in prefilling:
            self._take(w.request, w.new)
        for w in decoding:
            self._take(w.request, 1)

    def _take(self, request: Request, count: int) -> None:
        """So many more of the request's tokens are cached."""
        request.cached += count
        if self.limits.prefix_reuse:
            self._name_full_pages(request)

    def _name_full_pages(self, request: Request) -> None:
        settled = request.cached if self._drafter is None else self._drafter.settled(request)
        full = settled // self._session.cache.page_size
        if full <= request.named:
            return
        keys = request.keys.of(request.tokens, full)
        for index in range(request.named, full):
            self.pool.name(request.pages[index], keys[index])
        request.named = full

    def _sample(self, requests: list[Request], rows: Sequence[Floats] | Floats | Int32s) -> list[Event]:
        if not requests:
            return []
        logits = rows if isinstance(rows, np.ndarray) else np.stack(rows)
        return self._take_choices(requests, self._choices(requests, logits))

    def _take_choices(self, requests: list[Request], choices: Sequence[Choice | Exception]) -> list[Event]:
        """Each request's next token, or what ends it."""
        events: list[Event] = []
        guided: list[RowGuide] = []
        for request, choice in zip(requests, choices, strict=True):
            if isinstance(choice, Exception):
                events.append(self._failed(request, choice))
                continue
            token, logprob, top = choice
            if token == NOT_FINITE:
                events.append(self._failed(request, self._not_finite(request)))
                continue
            request.tokens.append(token)
            finished = request.finished_by(token)
            events.append(Event(request.id, token, finished, logprob, top))
            if finished:
                self._vacate(request)
                self._running.remove(request)
            elif request.sampler.guide:
                request.sampler.guide.consume(token)
                guided.append(request.sampler.guide)
        if guided and self._guides:
            self._guides.begin(guided)
        return events

    def _choices(self, requests: list[Request], logits: Floats | Int32s) -> Sequence[Choice | Exception]:
        """Each request's next token, or what its sampling raised."""
        return self._picking.choices([request.sampler for request in requests], logits)

    def _failed(self, request: Request, error: Exception) -> Event:
        """End the request; what it cached may not be used again."""
        self.pool.forget(request.pages)
        self._vacate(request)
        self._running.remove(request)
        return Event(request.id, NOT_FINITE, None, error=error)

    def _not_finite(self, request: Request) -> BackendError:
        return BackendError(
            f"the model's logits are not finite at token {request.sampler.made + 1} of the answer (computed in "
            f"{self._session.cache.dtype}): weights are NaN or infinite, or numbers outgrow the dtype; `deepseek-trt "
            "validate --bisect` finds where, and an export with --dtype bfloat16 has more room than float16"
        )


def _agreeing(work: list[Work], rows: list[int], at: int, picked: list[Event]) -> list[int]:
    """Those of `rows` that drafted one more token, number `at`, and for which it was picked; their answers go on."""
    tokens = {event.request: event.token for event in picked if event.finished is None and event.error is None}
    return [
        row for row in rows if at < len(work[row].draft) and tokens.get(work[row].request.id) == work[row].draft[at]
    ]
