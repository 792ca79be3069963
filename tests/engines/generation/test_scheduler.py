"""Scheduler: every request gets what it gets alone, whatever arrives, is cancelled or preempted beside it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.generation.speculation import MOST_DRAFTED, SPECULATE
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.cpu.sampling_row import unpack

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

GREEDY = SamplingParams(8, ignore_eos=True)
KINDS = (
    SamplingParams(10),
    SamplingParams(12, ignore_eos=True, logprobs=2),
    SamplingParams(12, temperature=6.0, seed=5, min_tokens=4),
    SamplingParams(9, temperature=8.0, top_k=5, top_p=0.8, seed=2, ignore_eos=True),
    SamplingParams(14, temperature=5.0, top_p=0.7, min_p=0.05, seed=9, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(11, repetition_penalty=1.3, stop_token_ids=(4, 7), min_tokens=3),
)


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> tuple[list, str]:
    """(token, logprob, top) of each step and the reason of the end, from the model without cache, pages or batch."""
    tokens, made = list(prompt), []
    limit = min(params.max_new_tokens, fake.Config.max_position_embeddings - len(prompt))
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(fake.Config.eos_token_ids))
    sampler = Sampler(params, prompt, sorted(stops))
    while True:
        (choice,) = sample_rows([sampler], fake.logits_after(tokens)[None])
        tokens.append(choice[0])
        made.append((choice[0], choice[1], unpack(choice[2])))
        if choice[0] in stops or len(made) == limit:
            return made, "stop" if choice[0] in stops else "length"


def drain(scheduler, limit=2000):
    events = []
    for _ in range(limit):
        if not scheduler.busy:
            return events
        events += scheduler.step()
        fake.check_pages(scheduler)
    raise AssertionError("the scheduler does not come to an end")


def answers(events):
    made = {}
    for event in events:
        made.setdefault(event.request, []).append(event)
    return {
        request: ([(e.token, e.logprob, unpack(e.likeliest)) for e in own], own[-1].finished)
        for request, own in made.items()
    }


def scheduler_of(pages=30, session=None, **limits) -> Scheduler:
    limits = {"max_running": 4, "token_budget": 16, "prefill_chunk": 6, **limits}
    kind = fake.DraftingSession if limits.get("speculate") == "mtp" else fake.FakeSession
    return Scheduler(session or kind(pages), fake.Config, SchedulerLimits(**limits))


PROMPTS = [(3,), (2, 5, 7, 3, 2), (5, 5, 5, 5), tuple(range(2, 13)) * 2, (2, 5, 7, 3, 2, 8, 9, 10, 4)]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("pages", [9, 12, 40])
def test_batch_equals_alone(pages, reuse):
    scheduler = scheduler_of(pages, prefix_reuse=reuse)
    ids = {scheduler.add(p, k): (p, k) for k in KINDS for p in PROMPTS if len(p) < 20 or k.max_new_tokens <= 10}
    made = answers(drain(scheduler))
    assert made == {request: alone(*wanted) for request, wanted in ids.items()}
    assert scheduler.pool.free == pages - 1
    assert (scheduler.counters.preemptions > 0) == (pages < 40)
    assert (scheduler.counters.reused > 0) == reuse


def test_requests_join_a_running_batch():
    session = fake.FakeSession(30)
    scheduler = scheduler_of(session=session)
    scheduler.add((3, 4), GREEDY)
    scheduler.step()
    scheduler.add((5, 6, 7), GREEDY)
    session.calls.clear()
    assert [e.request for e in scheduler.step()] == [0, 1]
    assert session.calls == [("prefill", (1, 3)), ("decode", (1, 1))]
    scheduler.step()
    assert session.calls[-1] == ("decode", (2, 1))


def test_budget_interleaves_prefill_with_decode():
    session = fake.FakeSession(40)
    scheduler = scheduler_of(session=session, max_running=3, token_budget=5)
    scheduler.add((3, 4), GREEDY)
    scheduler.step()
    scheduler.add(tuple(range(2, 13)), GREEDY)
    scheduler.add(tuple(range(2, 13)), GREEDY)
    seen = 0
    while scheduler.busy:
        session.calls.clear()
        decoding = any(e.request == 0 for e in scheduler.step())
        seen += decoding
        assert sum(rows * width for _, (rows, width) in session.calls) <= 5
    assert seen == 7  # not one step without a token for the first, while the others prefill


def test_prefill_takes_no_more_than_a_chunk():
    session = fake.FakeSession(40)
    scheduler = scheduler_of(session=session, prefill_chunk=3, token_budget=64)
    scheduler.add(tuple(range(2, 13)), GREEDY)
    drain(scheduler)
    assert [shape for name, shape in session.calls if name == "prefill"] == [(1, 3)] * 3 + [(1, 2)]


def test_a_chunk_gets_the_pages_that_it_reaches():
    scheduler, widths = scheduler_of(prefill_chunk=8), []
    prefill = scheduler._session.prefill
    scheduler._session.prefill = lambda *feeds: (widths.append(feeds[-1].shape[1]), prefill(*feeds))[1]
    scheduler.add((5,) * 20, GREEDY)
    drain(scheduler)
    size = scheduler._session.cache.page_size
    assert widths[:3] == [-(-end // size) for end in (8, 16, 20)]


def test_latest_arrival_is_preempted_and_loses_nothing():
    scheduler = scheduler_of(7)
    ids = [scheduler.add((n, 3, 4, 5, 6), dataclasses.replace(GREEDY, max_new_tokens=12)) for n in (2, 3)]
    events = drain(scheduler)
    assert scheduler.counters.preemptions > 0
    assert [e.request for e in events if e.finished] == ids
    assert answers(events) == {i: alone((n, 3, 4, 5, 6), dataclasses.replace(GREEDY, max_new_tokens=12)) for i, n in
                               zip(ids, (2, 3), strict=True)}  # fmt: skip


def test_cancel_frees_pages_at_once():
    scheduler = scheduler_of(30, max_running=1)
    first, second = scheduler.add((3, 4, 5, 6, 7), GREEDY), scheduler.add((3, 4), GREEDY)
    scheduler.step()
    assert scheduler.pool.free == 27
    assert scheduler.cancel(first)
    assert scheduler.pool.free == 29
    assert not scheduler.cancel(first)
    assert scheduler.cancel(second)
    assert not scheduler.busy


def test_equal_prefixes_are_computed_once_and_shared():
    session = fake.FakeSession(30)
    scheduler = scheduler_of(session=session, prefill_chunk=40, token_budget=80)
    prompt = tuple(range(2, 12))
    scheduler.add(prompt, GREEDY)
    scheduler.step()
    scheduler.add((*prompt, 3), GREEDY)
    session.calls.clear()
    scheduler.step()
    assert ("prefill", (1, 3)) in session.calls
    assert scheduler.counters.reused == 8
    assert scheduler.pool.free == 29 - 3 - 1  # two pages have two owners
    drain(scheduler)


def test_a_prompt_that_is_all_known_still_gets_its_logits():
    scheduler = scheduler_of(30)
    for _ in range(2):
        request = scheduler.add((2, 3, 4, 5, 6, 7, 8, 9), GREEDY)
        made = answers(drain(scheduler))[request]
        assert made == alone((2, 3, 4, 5, 6, 7, 8, 9), GREEDY)
    assert scheduler.counters.reused == 4  # not the page of the last token


def test_a_step_that_fails_can_be_tried_again():
    session = fake.FakeSession(30)
    scheduler = scheduler_of(session=session)
    request = scheduler.add((3, 4, 5), GREEDY)
    for _ in range(3):
        session.failures = 1
        with pytest.raises(OSError, match="gone"):
            scheduler.step()
        events = scheduler.step()
        assert [e.request for e in events] == [request]


def test_all_logits_are_read_at_the_last_real_token():
    class AllLogits(fake.FakeSession):
        def prefill(self, input_ids, sequence_lengths, past_lengths, page_table):
            last = super().prefill(input_ids, sequence_lengths, past_lengths, page_table)
            every = np.full((*input_ids.shape, fake.VOCAB), np.nan, dtype=np.float32)
            every[np.arange(len(last)), sequence_lengths - 1] = last
            return every if input_ids.shape[1] > 1 else last

    scheduler = scheduler_of(session=AllLogits(30))
    ids = {scheduler.add(p, GREEDY): p for p in PROMPTS}
    assert answers(drain(scheduler)) == {i: alone(p, GREEDY) for i, p in ids.items()}


def test_answer_ends_where_the_model_does():
    scheduler = scheduler_of(30)
    request = scheduler.add((5,) * 38, GREEDY)
    made, reason = answers(drain(scheduler))[request]
    assert (len(made), reason) == (2, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ((), GREEDY, "the prompt is empty"),
        ((13,), GREEDY, "outside 0..12"),
        ((3,) * 40, GREEDY, "takes at most 39"),
        ((3,) * 20, GREEDY, "7 cache pages, but there are 5"),
        ((3,), SamplingParams(stop_token_ids=(99,)), r"stop_token_ids \[99\]"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt, params, words):
    scheduler = scheduler_of(6)
    with pytest.raises(RequestError, match=words):
        scheduler.add(prompt, params)
    assert not scheduler.busy


@pytest.mark.parametrize("speculate", ["lookup", "mtp", "auto"])
@pytest.mark.parametrize("pages", [9, 12, 40])
def test_speculation_changes_no_answer(pages, speculate):
    """Sampled, penalised, with log-probabilities and stops: token for token what the model gives alone."""
    scheduler = scheduler_of(pages, speculate=speculate)
    ids = {scheduler.add(p, k): (p, k) for k in KINDS for p in PROMPTS if len(p) < 20 or k.max_new_tokens <= 10}
    made = answers(drain(scheduler))
    assert made == {request: alone(*wanted) for request, wanted in ids.items()}
    assert scheduler.pool.free == pages - 1
    assert scheduler.counters.drafted > 0 or speculate == "auto"


class Periodic(fake.FakeSession):
    """After token t comes t + 1, after 9 comes 2."""

    @staticmethod
    def after(token):
        return 2 if token == 9 else token + 1

    def _rows(self, name, input_ids, sequence_lengths, *given):
        rows = super()._rows(name, input_ids, sequence_lengths, *given)
        for ids, row in zip(input_ids, rows, strict=True):
            for token, logits in zip(ids.tolist(), row, strict=False):
                logits[self.after(token)] += 1000
        return rows


PERIOD = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3)


def test_what_repeats_takes_a_call_for_eight_tokens():
    session = Periodic(30)
    scheduler = scheduler_of(session=session, speculate="lookup", prefill_chunk=16)
    request = scheduler.add(PERIOD, SamplingParams(17, ignore_eos=True))
    (made, reason) = answers(drain(scheduler))[request]
    assert [token for token, *_ in made] == [4, 5, 6, 7, 8, 9, 2, 3] * 2 + [4]
    assert reason == "length"
    assert [shape for name, shape in session.calls if name == "decode"] == [(1, 8), (1, 8)]
    counters = scheduler.counters
    assert (counters.decoded, counters.drafted, counters.accepted) == (16, 14, 14)
    assert (counters.tokens_a_step, counters.acceptance) == (8.0, 1.0)


def test_drafts_are_no_longer_than_the_answer_and_the_budget():
    session = Periodic(30)
    scheduler = scheduler_of(session=session, speculate="lookup", max_running=2, token_budget=6, prefill_chunk=16)
    for _ in range(2):
        scheduler.add(PERIOD, SamplingParams(6, ignore_eos=True))
    assert all(len(made) == 6 for made, _ in answers(drain(scheduler)).values())
    decodes = [shape for name, shape in session.calls if name == "decode"]
    assert max(rows + steps - 1 for rows, steps in decodes) <= 6


def test_a_stop_among_drafts_ends_the_answer():
    scheduler = scheduler_of(session=Periodic(30), speculate="lookup", prefill_chunk=16)
    request = scheduler.add(PERIOD, SamplingParams(30, stop_token_ids=(7,)))
    made, reason = answers(drain(scheduler))[request]
    assert ([token for token, *_ in made], reason) == ([4, 5, 6, 7], "stop")
    assert scheduler.pool.free == 29


def test_drafts_take_free_pages_alone_and_give_them_back():
    class Broken(Periodic):
        def decode(self, *feeds):
            if self.failures:
                self.failures -= 1
                raise OSError("the device is gone")
            return super().decode(*feeds)

    session = Broken(6)
    scheduler = scheduler_of(session=session, speculate="lookup", prefill_chunk=16)
    scheduler.add((*PERIOD, 4), SamplingParams(8, ignore_eos=True))
    scheduler.step()
    session.failures, held = 1, scheduler.pool.free
    with pytest.raises(OSError, match="gone"):
        scheduler.step()
    assert scheduler.pool.free == held
    fake.check_pages(scheduler)
    assert len(drain(scheduler)) == 7
    assert scheduler.counters.preemptions == 0


@pytest.mark.parametrize(
    "limits", [{"max_running": 0}, {"token_budget": 3}, {"prefill_chunk": 0}, {"speculate": "often"}]
)
def test_limits_that_cannot_work_are_refused(limits):
    with pytest.raises(RequestError, match=next(iter(limits))):
        scheduler_of(**limits)


BLOCKS = ((2, 5, 7, 3), (9, 2, 4, 11), (6, 6, 10, 12))  # a page each, so that prompts share pages, or seem to
PROMPT = st.builds(
    lambda blocks, own: sum(blocks, ()) + tuple(own) or (3,),
    st.lists(st.sampled_from(BLOCKS), max_size=4),
    st.lists(st.integers(2, 12), max_size=5),
)


def check_order(requests, speculate):
    """Every request at most once, in order of arrival; then in rounds of the same kind those that drafted well."""
    rounds = [[]]
    for request in requests:
        if rounds[-1] and request <= rounds[-1][-1]:
            rounds.append([])
        rounds[-1].append(request)
    assert len(rounds) == 1 or speculate != "off"
    assert len(rounds) <= 1 + MOST_DRAFTED
    assert all(set(later) <= set(before) for before, later in pairwise(rounds))


class SchedulerMachine(RuleBasedStateMachine):
    """Requests arrive, are cancelled and preempted at any time; each must get what it gets alone."""

    seen: ClassVar[Counter[str]] = Counter()  # over all runs

    @initialize(
        pages=st.integers(10, 24),
        running=st.integers(1, 5),
        budget=st.integers(5, 30),
        chunk=st.integers(1, 7),
        reuse=st.booleans(),
        speculate=st.sampled_from(SPECULATE),
    )
    def open(self, pages, running, budget, chunk, reuse, speculate):
        self.wanted, self.made = {}, {}
        limits = {"max_running": running, "token_budget": budget, "prefill_chunk": chunk, "prefix_reuse": reuse}
        self.scheduler = scheduler_of(pages, **limits, speculate=speculate)

    @rule(prompt=PROMPT, kind=st.sampled_from(KINDS))
    def arrive(self, prompt, kind):
        request = self.scheduler.add(prompt, kind)
        self.wanted[request], self.made[request] = (prompt, kind), []

    @precondition(lambda self: self.scheduler.busy)
    @rule(times=st.sampled_from([1, 1, 2, 5]))
    def step(self, times):
        for _ in range(times):
            self.take(self.scheduler.step())

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(sorted(self.wanted)))
        free, running = self.scheduler.pool.free, self.scheduler.running
        assert self.scheduler.cancel(request)
        self.seen["cancelled running" if self.scheduler.running < running else "cancelled waiting"] += 1
        assert self.scheduler.pool.free >= free
        del self.wanted[request]

    def take(self, events):
        self.seen["steps"] += 1
        check_order([e.request for e in events], self.scheduler.limits.speculate)
        for event in events:
            own = self.made[event.request]
            own.append((event.token, event.logprob, unpack(event.likeliest)))
            tokens, reason = alone(*self.wanted[event.request])
            assert own[-1] == tokens[len(own) - 1]
            assert event.finished == (reason if len(own) == len(tokens) else None)
            if event.finished:
                del self.wanted[event.request]

    @invariant()
    def pages_are_in_order(self):
        if hasattr(self, "scheduler"):
            fake.check_pages(self.scheduler)
            assert self.scheduler.running <= self.scheduler.limits.max_running
            assert self.scheduler.running + len(self.scheduler._waiting) == len(self.wanted)

    def teardown(self):
        if hasattr(self, "scheduler"):
            self.take_all()
            self.seen["preempted"] += self.scheduler.counters.preemptions
            counters = self.scheduler.counters
            self.seen["reused"] += counters.reused
            self.seen["accepted"] += counters.accepted
            self.seen["rejected"] += counters.drafted - counters.accepted
            assert not self.wanted
            assert self.scheduler.pool.free == self.scheduler.pool.pages - 1

    def take_all(self):
        for _ in range(2000):
            if not self.scheduler.busy:
                return
            self.take(self.scheduler.step())
        raise AssertionError("the scheduler does not come to an end")


def test_thousands_of_steps_under_arrival_cancellation_and_preemption():
    """Also that all of it came up: a machine that never runs out of pages would prove nothing about preemption."""
    SchedulerMachine.seen.clear()
    often = settings(max_examples=150, stateful_step_count=50, deadline=None, database=None)
    run_state_machine_as_test(SchedulerMachine, settings=often)
    seen = SchedulerMachine.seen
    assert seen["steps"] > 3000, seen
    rare = ("preempted", "reused", "cancelled running", "cancelled waiting", "accepted", "rejected")
    assert min(seen[what] for what in rare) > 0, seen


@pytest.fixture(scope="module")
def demo(demo_checkpoint, bundle_of, request):
    return bundle_of(demo_checkpoint, page_size=8, cache_dtype=request.param)


@pytest.mark.parametrize("demo", [None, "int8", "fp8"], ids=["whole", "int8", "fp8"], indirect=True)
@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_demo_model_under_pressure_equals_alone(demo, speculate):
    """Through ONNX Runtime: short prompts, few pages, shared prefixes; each token as in a batch of one."""
    from deepseek_trt.engines.sessions.ort import OrtSession
    from deepseek_trt.engines.text.text import Text

    config = dataclasses.replace(demo.manifest.model, eos_token_ids=())
    session = OrtSession(demo, 10, threads=1)
    words = ("Return the name of", "The number of", "Return the name of the file", "If the file does not exist, then")
    prompts = [Text(demo).encode(text) for text in words]
    params = SamplingParams(20)
    alone = LLM(session, config, limits=SchedulerLimits.for_batch(1))
    expected = [list(alone.generate([prompt], params)[0].token_ids) for prompt in prompts]
    scheduler = Scheduler(session, config, SchedulerLimits(4, 16, 6, speculate=speculate))
    made = {scheduler.add(prompt, params): [] for prompt in prompts}
    while scheduler.busy:
        for event in scheduler.step():
            made[event.request].append(event.token)
        fake.check_pages(scheduler)
    assert list(made.values()) == expected
    assert (scheduler.counters.drafted > 0) == (speculate == "lookup")
    assert scheduler.counters.preemptions > 0


def test_limits_that_nobody_gave_grow_with_the_sessions_chunk():
    plain, given = SchedulerLimits(max_running=4), SchedulerLimits(max_running=4, prefill_chunk=512)
    assert (plain.on(512), given.on(4096)) == (plain, given)
    assert (plain.on(4096).prefill_chunk, plain.on(4096).token_budget) == (4096, 8192)
    assert (plain.on(16).prefill_chunk, plain.on(16).token_budget) == (16, 1024)
    budget = SchedulerLimits(token_budget=100).on(2048)
    assert (budget.prefill_chunk, budget.token_budget) == (2048, 100)
    assert SchedulerLimits.for_batch(3).on(2048).token_budget == 3 * 2048
    assert dataclasses.replace(plain, speculate="lookup").on(2048).prefill_chunk == 2048


def test_a_session_with_a_chunk_of_its_own_gets_prompts_in_such():
    session = fake.FakeSession(20)
    session.chunk = 6
    scheduler = Scheduler(session, fake.Config)
    scheduler.add([2] * 16, SamplingParams(1))
    while scheduler.busy:
        scheduler.step()
    assert session.calls == [("prefill", (1, 6)), ("prefill", (1, 6)), ("prefill", (1, 4))]
