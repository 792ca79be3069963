"""Several tokens a step: whatever a drafter proposes, every request gets what it gets alone, token by token.

Requests with stop strings, guides and other ends come, are cancelled and preempted, prefixes are used again, and calls
of the session fail.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import ClassVar

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("llguidance", reason="the extra `guided` is not installed")

from deepseek_trt.engines.generation.answer import Answer
from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.generation.guiding import Guides
from deepseek_trt.engines.generation.loop import EngineLoop
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.request import Event
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.generation.speculation import MOST_DRAFTED
from deepseek_trt.engines.text.stream import TextStream

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)


class Letters:
    """As much of a Text as answers and guides read: a tokenizer of thirteen letters."""

    added_tokens = ()

    def __init__(self):
        self.tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcdefghijklm")}, merges=[]))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.decoder = decoders.ByteLevel()

    def to_json(self):
        return self.tokenizer.to_str()

    def token_id(self, written):
        return self.tokenizer.token_to_id(written)

    def stream(self):
        return TextStream(self.tokenizer, {})


LETTERS = Letters()
GUIDES = Guides(LETTERS, fake.VOCAB, fake.Config.eos_token_ids)
KINDS = (
    SamplingParams(10),
    SamplingParams(1, ignore_eos=True),
    SamplingParams(12, ignore_eos=True, logprobs=2),
    SamplingParams(16, temperature=6.0, seed=5, min_tokens=4),
    SamplingParams(14, temperature=5.0, top_p=0.7, min_p=0.05, seed=9, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(11, repetition_penalty=1.3, stop_token_ids=(4, 7), min_tokens=3),
    SamplingParams(14, temperature=9.0, seed=3, ignore_eos=True, stop=("c", "gh", "mm")),
    SamplingParams(14, temperature=9.0, seed=4, ignore_eos=True, stop=("e", "ij"), min_tokens=5),
    SamplingParams(16, temperature=4.0, seed=6, guide=Guide("regex", "[c-h]{3}(ij|kl){1,4}")),
    SamplingParams(16, guide=Guide("regex", "[ac-m]{4,9}"), logprobs=1),
    SamplingParams(12, temperature=3.0, seed=8, guide=Guide.choice(["cdefg", "cdfgh", "klm"]), frequency_penalty=0.2),
    SamplingParams(14, temperature=5.0, seed=1, guide=Guide("regex", "[d-g]{2,6}", after="m"), stop=("ff",)),
)


@cache
def alone(prompt, params):
    """All tokens of the answer as they go on where no stop string ends it, and the pieces that a caller gets."""
    tokens, pieces = list(prompt), []
    limit = min(params.max_new_tokens, fake.Config.max_position_embeddings - len(prompt))
    free = params.ignore_eos and params.guide is None
    stops = set(params.stop_token_ids) | (set() if free else set(fake.Config.eos_token_ids))
    guide = GUIDES.compiled(params.guide) if params.guide else None
    sampler, answer = Sampler(params, prompt, sorted(stops), guide=guide), Answer(LETTERS, params)
    for made in range(1, limit + 1):
        ((token, logprob, likeliest),) = sample_rows([sampler], fake.logits_after(tokens)[None])
        tokens.append(token)
        finished = "stop" if token in stops else "length" if made == limit else None
        if not (pieces and pieces[-1].finish_reason):
            pieces.append(answer.piece(Event(0, token, finished, logprob, likeliest)))
        if finished:
            break
        if guide:
            guide.consume(token)
    return tokens[len(prompt) :], pieces


class Drafter:
    """Proposes what comes next, up to a place of its choice, and then what does not."""

    ways = ("right", "right", "wrong", "partly", "partly", "none")

    def __init__(self, prompt, kind, seed, seen):
        """`seen` counts what was proposed."""
        wanted = [*prompt, *alone(prompt, kind)[0]]
        self._longest = min(len(prompt) + kind.max_new_tokens, fake.Config.max_position_embeddings)
        self._wanted, self._choice, self._seen, self._known = wanted, random.Random(seed), seen, []
        self.useful = 0  # proposed tokens after each of which another one is picked

    def draft(self, tokens, most):
        assert 1 <= most <= MOST_DRAFTED
        assert len(tokens) + most < self._longest  # the token after the last proposed one is still of the answer
        assert tokens[: len(self._known)] == self._known
        assert tokens == self._wanted[: len(tokens)]
        self._known = list(tokens)
        way = self._choice.choice(self.ways)
        right = {"right": most, "partly": self._choice.randrange(most)}.get(way, 0)
        self._seen[f"drafted {way}"] += 1
        after = self._wanted[len(tokens) : len(tokens) + most]
        self._seen["drafted behind the end"] += way == "right" and len(after) < most
        after += [5] * (most - len(after))
        self.useful += min(right, max(len(self._wanted) - 1 - len(tokens), 0))
        wrong = [(token + 1 + self._choice.randrange(fake.VOCAB - 1)) % fake.VOCAB for token in after]
        return [] if way == "none" else [*after[:right], *wrong[right:]]


BLOCKS = ((2, 5, 7, 3), (9, 2, 4, 11), (6, 6, 10, 12))  # a page each, so that prompts share pages, or seem to
PROMPT = st.builds(
    lambda blocks, own: sum(blocks, ()) + tuple(own) or (3,),
    st.lists(st.sampled_from(BLOCKS), max_size=4),
    st.lists(st.integers(2, 12), max_size=5),
)


class SpeculationMachine(RuleBasedStateMachine):
    """Through the loop that serves callers: what they get, and that pages and books are in order after every step."""

    seen: ClassVar[Counter[str]] = Counter()  # over all runs

    @initialize(
        pages=st.integers(10, 24),
        running=st.integers(1, 5),
        budget=st.integers(5, 40),
        chunk=st.integers(1, 9),
        reuse=st.booleans(),
        speculate=st.sampled_from(["lookup", "lookup", "auto"]),
    )
    def open(self, pages, running, budget, chunk, reuse, speculate):
        limits = SchedulerLimits(running, budget, chunk, prefix_reuse=reuse, speculate=speculate)
        self.session = fake.FakeSession(pages)
        self.scheduler = Scheduler(self.session, fake.Config, limits, GUIDES)
        self.scheduler._payoff.clock = itertools.count().__next__  # every call takes one
        self.loop, self.tickets = EngineLoop(self.scheduler), {}

    @rule(prompt=PROMPT, kind=st.sampled_from(KINDS), seed=st.integers(0, 2**16))
    def arrive(self, prompt, kind, seed):
        _, wanted = alone(prompt, kind)
        answer, made = Answer(LETTERS, kind), []

        def deliver(event):
            assert isinstance(event, Event), event
            made.append(answer.piece(event))
            assert made == wanted[: len(made)]
            if made[-1].finish_reason:
                self.seen[f"ended by {made[-1].finish_reason}"] += 1
                self.seen["stop strings"] += event.finished != made[-1].finish_reason
                self.seen["guided answers"] += kind.guide is not None
                assert len(made) == len(wanted)
                del self.tickets[ticket]
            return made[-1].finish_reason is not None

        ticket = self.loop.submit(prompt, kind, deliver)
        ticket.request.lookup = Drafter(prompt, kind, seed, self.seen)
        self.tickets[ticket] = made

    @precondition(lambda self: self.scheduler.busy or self.tickets)
    @rule(times=st.sampled_from([1, 1, 2, 5]))
    def step(self, times):
        for _ in range(times):
            self.loop.step()
            self.check()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from([*self.tickets]))
        self.seen["cancelled" if self.tickets.pop(ticket) else "cancelled early"] += 1
        self.loop.cancel([ticket])
        self.loop.settle()
        self.check()

    @precondition(lambda self: self.tickets)
    @rule()
    def fail(self):
        """A call fails; nobody has moved, and the next step goes on."""
        self.loop.settle()
        made, self.session.failures = {ticket: len(own) for ticket, own in self.tickets.items()}, 1
        with pytest.raises(OSError, match="gone"):
            self.loop.step()
        assert {ticket: len(own) for ticket, own in self.tickets.items()} == made
        self.seen["failed calls"] += 1
        self.check()

    def check(self):
        self.seen["steps"] += 1
        fake.check_pages(self.scheduler)
        counters = self.scheduler.counters
        assert 0 <= counters.accepted <= min(counters.drafted, counters.decoded)

    @invariant()
    def nobody_keeps_pages_of_drafts(self):
        if hasattr(self, "scheduler"):
            for request in self.scheduler._running:
                assert len(request.pages) <= self.session.cache.pages_for(len(request.tokens))

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.tickets:
                break
            self.loop.step()
            self.check()
        self.loop.settle()
        assert not self.tickets
        assert not self.scheduler.busy
        assert self.scheduler.pool.free == self.scheduler.pool.pages - 1
        for name in ("preemptions", "reused", "accepted"):
            self.seen[name] += getattr(self.scheduler.counters, name)


WANTED = ("drafted right", "drafted wrong", "drafted partly", "drafted none", "drafted behind the end", "accepted")
WANTED += ("ended by stop", "ended by length", "stop strings", "guided answers", "cancelled", "cancelled early")
WANTED += ("preemptions", "reused", "failed calls")


def test_thousands_of_steps_with_drafts():
    """Also that all of it came up."""
    SpeculationMachine.seen.clear()
    often = settings(max_examples=120, stateful_step_count=40, deadline=None, database=None)
    run_state_machine_as_test(SpeculationMachine, settings=often)
    seen = SpeculationMachine.seen
    assert seen["steps"] > 2000, seen
    assert min(seen[what] for what in WANTED) > 0, seen


@pytest.mark.parametrize("way", ["right", "wrong", "partly", "none"])
@pytest.mark.parametrize("pages", [12, 60])
def test_every_kind_beside_every_other_with_such_drafts(way, pages):
    """All kinds of answers in one batch; with pages enough every proposed token that could save a call does."""
    session = fake.FakeSession(pages)
    scheduler = Scheduler(session, fake.Config, SchedulerLimits(5, 40, 9, speculate="lookup"), GUIDES)
    made, wanted, drafters = {}, {}, []
    for number, kind in enumerate(KINDS):
        prompt = BLOCKS[number % 3] + BLOCKS[number % 2][: number % 4]
        request = scheduler.prepare(prompt, kind)
        request.lookup = Drafter(prompt, kind, number, Counter())
        request.lookup.ways = (way,)
        drafters.append(request.lookup)
        wanted[scheduler.queue(request)] = alone(prompt, kind)[0]
    while scheduler.busy:
        for event in scheduler.step():
            made.setdefault(event.request, []).append(event.token)
        fake.check_pages(scheduler)
    assert made == wanted
    counters = scheduler.counters
    assert (counters.accepted > 0) == (way in ("right", "partly"))
    assert (counters.drafted > 0) == (way != "none")
    if pages == 60:
        assert counters.accepted == sum(drafter.useful for drafter in drafters)
    assert scheduler.pool.free == pages - 1
