"""Chunks: beside answers a step's prefill stays within its bound, whole pages at a time, and every prompt ends."""

from __future__ import annotations

import dataclasses
import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.chunking.cost import PrefillCost
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.config.model_config import ModelConfig

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[2] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

V2_LITE = ModelConfig(
    **{"vocab_size": 16, "eos_token_ids": (), "max_position_embeddings": 163840},
    **{"q_lora_rank": None, "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16},
    **{"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    num_hidden_layers=27,
)
LONG, SHORT = 32768, 64
ANSWER = SamplingParams(4000, ignore_eos=True)


class Counting(Session):
    """Computes nothing; `steps` has (new tokens and cached ones of every row that is prefilled, rows that decode)."""

    backend, note = "counting", ""
    cache = CacheSpec(1, 64, 1, "float32")

    def __init__(self, pages):
        self.pages, self.steps = pages, []

    def prefill(self, input_ids, sequence_lengths, past_lengths, page_table):
        self.steps.append(([*zip(sequence_lengths.tolist(), past_lengths.tolist(), strict=True)], 0))
        return np.zeros((len(input_ids), 16), dtype=np.float32)

    def decode(self, input_ids, sequence_lengths, past_lengths, page_table):
        if self.steps:  # comes after the step's prefill
            self.steps[-1] = self.steps[-1][0], len(input_ids)
        return np.zeros((*input_ids.shape, 16), dtype=np.float32)


def chunks_of(prompts, decoding, **limits):
    """What is prefilled of prompts of such lengths, step by step, beside so many rows that decode."""
    session = Counting(3000)
    scheduler = Scheduler(session, V2_LITE, SchedulerLimits(**{"prefix_reuse": False, **limits}))
    for _ in range(decoding):
        scheduler.add([3] * 8, ANSWER)
    while any(not request.decodes for request in [*scheduler._running, *scheduler._waiting]):
        scheduler.step()
    session.steps.clear()
    own = {scheduler.add([3] * length, SamplingParams(1)) for length in prompts}
    while own:
        own -= {event.request for event in scheduler.step() if event.finished}
    return session.steps


def operations(rows, cost):
    """Of a step of such rows, padding counted as tokens."""
    padded = len(rows) * max(tokens for tokens, _ in rows)
    return padded * cost.token + sum(cost.of(tokens, past) - tokens * cost.token for tokens, past in rows)


def test_a_long_prompts_chunks_become_shorter_where_others_decode():
    """The bound is twice the cost of a first chunk; a last chunk of 512 would cost more than four times as much."""
    cost, steps = PrefillCost.of_model(V2_LITE), chunks_of([LONG], decoding=2)
    assert all(decoding == 2 for _, decoding in steps)
    chunks = [chunk for ((chunk,), _) in steps]
    assert max(cost.of(*chunk) for chunk in chunks) <= 2 * cost.of(512, 0) < cost.of(512, LONG - 512) / 2
    assert chunks[0] == (512, 0)
    assert chunks[-1][0] <= 128
    assert [past for _, past in chunks] == [0, *(past + tokens for tokens, past in chunks[:-1])]
    assert sum(tokens for tokens, _ in chunks) == LONG
    lengths = [tokens for tokens, _ in chunks[:-1]]
    assert all(later <= before for before, later in pairwise(lengths))
    assert all(tokens % 64 == 0 for tokens in lengths)  # pages are filled whole
    wasted = [cost.of(tokens + 64, past) for tokens, past in chunks[:-1] if tokens < 512]
    assert min(wasted) > 2 * cost.of(512, 0)  # one page more would have been too much


def test_chunks_are_whole_where_nobody_waits():
    assert chunks_of([LONG], decoding=0) == [([(512, past)], 0) for past in range(0, LONG, 512)]


def test_the_bound_is_of_all_rows_together():
    cost, steps = PrefillCost.of_model(V2_LITE), chunks_of([4096, 8192, SHORT, 300, 6000], decoding=3)
    bound = 2 * cost.of(512, 0)
    assert max(operations(rows, cost) for rows, _ in steps) <= bound
    assert sum(tokens for rows, _ in steps for tokens, _ in rows) == 4096 + 8192 + SHORT + 300 + 6000
    assert any(len(rows) > 1 for rows, _ in steps)


def test_a_budget_that_holds_less_than_a_chunk_is_the_bound():
    cost, steps = PrefillCost.of_model(V2_LITE), chunks_of([8192], decoding=1, token_budget=200)
    assert max(operations(rows, cost) for rows, _ in steps) <= cost.of(200, 0)
    assert sum(rows[0][0] for rows, _ in steps) == 8192


def test_the_earliest_prompt_goes_on_where_even_a_token_is_beyond_the_bound():
    session = fake.FakeSession(40)
    costly = type("Costly", (fake.Config,), {"intermediate_size": 0, "kv_lora_rank": 50})
    scheduler = Scheduler(session, costly, SchedulerLimits(2, 2, 1))
    scheduler.add((3, 4), SamplingParams(30, ignore_eos=True))
    while not any(request.decodes for request in scheduler._running):
        scheduler.step()
    scheduler.add((5,) * 20, SamplingParams(1))
    session.calls.clear()
    while scheduler.running > 1 or scheduler._waiting or len(session.calls) < 2:
        scheduler.step()
    assert [shape for name, shape in session.calls if name == "prefill"] == [(1, 1)] * 19  # decode takes the last
    assert PrefillCost.of_model(costly).of(1, 3) > scheduler._chunks.bound


class Costed(fake.FakeSession):
    """Counts what each prefill costs, pair by pair."""

    def __init__(self, pages):
        super().__init__(pages)
        self.costs = []

    def prefill(self, input_ids, sequence_lengths, past_lengths, page_table):
        total = input_ids.size * 41  # padding, too
        for tokens, past in zip(sequence_lengths.tolist(), past_lengths.tolist(), strict=True):
            pairs = sum(past + own + 1 for own in range(tokens))
            total += 2 * tokens + 3 * pairs  # absorbed: to expand takes 2 of every cached token, too
        self.costs.append(total)
        return super().prefill(input_ids, sequence_lengths, past_lengths, page_table)


@settings(max_examples=120, deadline=None, database=None)
@given(
    prompts=st.lists(st.integers(1, 36), min_size=1, max_size=6),
    budget=st.integers(4, 40),
    chunk=st.integers(1, 12),
    reuse=st.booleans(),
)
def test_any_prompts_stay_within_the_bound_and_answers_are_those_of_whole_prompts(prompts, budget, chunk, reuse):
    session = Costed(60)
    scheduler = Scheduler(session, fake.Config, SchedulerLimits(4, budget, chunk, prefix_reuse=reuse))
    first = min(budget, chunk)
    bound = budget * (41 * first + 2 * first + 3 * first * (first + 1) // 2) // first
    whole = {}
    for length in prompts:
        prompt, params = tuple(2 + (i * i) % 9 for i in range(length)), SamplingParams(4, ignore_eos=True)
        whole[scheduler.add(prompt, params)] = fake.logits_after(list(prompt)).argmax()
    while scheduler.busy:
        session.costs.clear()
        decoding = [dataclasses.replace(request) for request in scheduler._running if request.decodes]
        for event in scheduler.step():
            assert whole.pop(event.request, event.token) == event.token
        fake.check_pages(scheduler)
        if decoding and scheduler.counters.preemptions == 0:
            assert sum(session.costs) <= max(bound, 41 + 2 + 3 * 36)  # a token where that alone is more
    assert not whole


@pytest.mark.parametrize("budget", [512, 1024, 4096])
def test_the_bound_is_the_budgets_share_of_first_chunks(budget):
    scheduler = Scheduler(Counting(9), V2_LITE, SchedulerLimits(token_budget=budget))
    cost = PrefillCost.of_model(V2_LITE)
    assert scheduler._chunks.bound == budget // 512 * cost.of(512, 0)
