"""The layer of multi-token prediction as a drafter: no answer changes, and what it is given is what it was made for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.drafting.drafter import LookupDrafter, MtpDrafter, drafter_of
from deepseek_trt.engines.generation.drafting.states import MOST_DEPTH, States
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.export.errors import RequestError

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[2] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

GREEDY = SamplingParams(24, ignore_eos=True)


def scheduler_of(session, **limits):
    limits = {"max_running": 4, "token_budget": 16, "prefill_chunk": 6, "speculate": "mtp", **limits}
    return Scheduler(session, fake.Config, SchedulerLimits(**limits))


def drain(scheduler):
    made = {}
    while scheduler.busy:
        for event in scheduler.step():
            made.setdefault(event.request, []).append(event.token)
        fake.check_pages(scheduler)
    return made


def greedy(prompt, count=GREEDY.max_new_tokens):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(fake.logits_after(tokens))))
    return tokens[len(prompt) :]


def test_drafts_that_are_right_save_steps():
    """The fake layer is right while its slots are: every draft is picked, up to three a step after the first."""
    session = fake.DraftingSession(30)
    scheduler = scheduler_of(session)
    scheduler.add((3, 4, 5), GREEDY)
    assert drain(scheduler) == {0: greedy((3, 4, 5))}
    counters = scheduler.counters
    assert counters.acceptance == 1.0
    decodes = [shape for name, shape in session.calls if name == "decode"]
    assert [width for _, width in decodes] == [2, 3, 4, 4, 4, 4, 2]  # 1 of the prefill and 23 tokens
    assert scheduler.pool.free == 29


def test_greedy_answers_of_many_under_pressure():
    prompts = [(3,), (2, 5, 7, 3, 2), (5, 5, 5, 5), (2, 5, 7, 3, 2, 8, 9, 10, 4), (2, 5, 7, 3, 6)]
    session = fake.DraftingSession(11)
    scheduler = scheduler_of(session)
    for prompt in prompts:
        scheduler.add(prompt, GREEDY)
    assert drain(scheduler) == {row: greedy(prompt) for row, prompt in enumerate(prompts)}
    assert scheduler.counters.preemptions > 0
    assert scheduler.counters.accepted > 0


def test_shared_pages_hold_the_layers_slots_too():
    """A page is shared once the layer has taken its states; none is missing where another goes on behind it."""
    prompt = tuple(range(2, 12))
    session = fake.DraftingSession(40)
    scheduler = scheduler_of(session)
    scheduler.add(prompt, GREEDY)
    made = drain(scheduler)
    scheduler.add((*prompt, 3, 4), GREEDY)  # which asserts that no state was left out
    assert scheduler.limits.prefix_reuse
    made |= drain(scheduler)
    assert scheduler.counters.reused >= 8
    assert made == {0: greedy(prompt), 1: greedy((*prompt, 3, 4))}


def test_long_prompts_fill_the_cache_before_they_decode():
    class Config(fake.Config):
        max_position_embeddings = 1200

    session = fake.DraftingSession(400)
    limits = SchedulerLimits(2, 512, 512, prefix_reuse=False, speculate="mtp")
    scheduler = Scheduler(session, Config, limits)
    scheduler.add([2 + i % 9 for i in range(1000)], SamplingParams(5, ignore_eos=True))
    drain(scheduler)
    assert max(width for name, (_, width) in session.calls if name == "draft") <= 256


@pytest.mark.parametrize("fails", ["gone", "failures"])
def test_a_failed_call_moves_no_request(fails):
    session = fake.DraftingSession(12)
    scheduler = scheduler_of(session)
    scheduler.add((3, 4, 5), GREEDY)
    made = scheduler.step() + scheduler.step()
    setattr(session, fails, 2)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            scheduler.step()
        fake.check_pages(scheduler)
    tokens = [event.token for event in made] + drain(scheduler)[0]
    assert tokens == greedy((3, 4, 5))


def test_auto_rests_and_comes_back_without_a_gap(monkeypatch):
    """While it rests states wait; the layer takes them before it drafts again (or the session would complain)."""

    class Config(fake.Config):
        max_position_embeddings = 700

    session = fake.DraftingSession(200)
    scheduler = Scheduler(session, Config, SchedulerLimits(2, 64, 16, speculate="auto"))
    wants = iter([True, True, *[False] * 400, *[True] * 999])
    monkeypatch.setattr(scheduler._payoff, "wants", lambda rows: next(wants))
    scheduler.add((3, 4, 5), SamplingParams(500, ignore_eos=True))
    assert drain(scheduler)[0] == greedy((3, 4, 5), 500)
    assert scheduler.counters.accepted > 50


def test_states():
    states = States()
    states.restart(4)
    rows = np.arange(10, dtype=np.float32)[:, None]
    states.keep(4, rows[:3])
    states.keep(7, rows[3:6])
    states.keep(8, rows[8:])  # two that were drafted were refused
    assert states.take(4)[:, 0].tolist() == [0, 1, 2, 3]
    states.fill(4)
    assert (states.filled, states.take(2)[:, 0].tolist()) == (8, [8, 9])
    states.keep(8, rows[:1])
    assert states.take(9)[:, 0].tolist() == [0]


def test_depth_follows_what_was_picked():
    states, cached, depths = States(), 10, []
    for picked in (1, 2, 3, 3, 1, 0, 0, 1):
        states.draft, states.drafted_at = [0] * states.depth, cached
        cached += 1 + picked
        states.deepen(cached)
        depths.append(states.depth)
    assert depths == [2, 3, 3, 3, 1, 1, 1, 2]
    assert max(depths) == MOST_DEPTH


def test_ways():
    plain, drafting = fake.FakeSession(4), fake.DraftingSession(4)
    assert drafter_of("off", drafting) is None
    assert isinstance(drafter_of("lookup", drafting), LookupDrafter)
    assert isinstance(drafter_of("auto", plain), LookupDrafter)
    assert isinstance(drafter_of("auto", drafting), MtpDrafter)
    assert isinstance(drafter_of("mtp", drafting), MtpDrafter)
    with pytest.raises(
        RequestError,
        match="speculate 'mtp': this session has no such layer: export a checkpoint that has one with --mtp",
    ):
        drafter_of("mtp", plain)


@pytest.mark.parametrize("strength", [0.01, 0.3])
def test_real_layer_drafts_and_changes_nothing(mtp_checkpoint, bundle_of, strength):
    """Through the compiled operators: greedy and sampled answers are those without, and drafts are picked."""
    bundle = bundle_of(mtp_checkpoint(strength), dtype="float32", mtp=True, page_size=8)
    prompts = [[5, 9, 17, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48], [7]]
    found = {}
    for way in ("off", "mtp"):
        limits = SchedulerLimits(3, 64, 8, speculate=way)
        with LLM.open(bundle.path, backend="ort", threads=1, limits=limits, pages=40) as llm:
            greedily = llm.generate(prompts, SamplingParams(40, ignore_eos=True))
            sampled = llm.generate(prompts, SamplingParams(20, temperature=0.7, seed=3, ignore_eos=True))
            found[way] = [result.token_ids for result in (*greedily, *sampled)]
            counters = llm.scheduler.counters
    assert found["mtp"] == found["off"]
    assert counters.accepted > 0
    if strength == 0.01:  # the next token follows from the last one: only sampled ones can differ
        assert counters.acceptance > 0.5


def test_a_bundle_without_the_layer_is_refused(mtp_checkpoint, bundle_of):
    bundle = bundle_of(mtp_checkpoint(1.0), dtype="float32")
    with pytest.raises(RequestError, match="has no layer of multi-token prediction: export a checkpoint"):
        LLM.open(bundle.path, speculate="mtp")
