"""`auto` through the scheduler, by a clock that the session moves: it proposes where that pays, and stops where not."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.batching.limits import Counters, SchedulerLimits
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.graph import CacheSpec

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

VOCAB, LONGEST = 22, 4096


class Config(fake.Config):
    vocab_size = VOCAB
    max_position_embeddings = LONGEST
    eos_token_ids = ()


class Timed(Session):
    """A decode call takes one second, and `each` seconds for every token of a row beyond the first.

    Whatever comes before, after position i comes text[i + 1].
    """

    backend, note = "timed", ""
    cache = CacheSpec(1, 64, 1, "float32")

    def __init__(self, each, text):
        self.pages, self.each, self.text, self.now = 600, each, text, 0.0
        self.calls = []  # tokens a row of each decode call

    def clock(self):
        return self.now

    def prefill(self, input_ids, sequence_lengths, past_lengths, page_table):
        self.now += 1
        return np.stack([self._logits(int(end) - 1) for end in past_lengths + sequence_lengths])

    def decode(self, input_ids, sequence_lengths, past_lengths, page_table):
        longest = input_ids.shape[1]
        self.now += 1 + self.each * (longest - 1)
        self.calls.append(longest)
        return np.stack([[self._logits(int(past) + at) for at in range(longest)] for past in past_lengths])

    def _logits(self, position):
        """After the token at `position`."""
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[self.text[min(position + 1, LONGEST - 1)]] = 1
        return logits


PERIODIC = np.resize(np.arange(2, 9), LONGEST)
RANDOM = np.random.default_rng(0).integers(2, 22, LONGEST)  # so few tokens that two alike stood before, as a rule


@dataclass(frozen=True)
class Ran:
    """Seconds by the session's clock, and what was counted."""

    seconds: float
    calls: list[int]
    counters: Counters


def ran(speculate, each, text, rows=1, tokens=2000):
    session = Timed(each, text)
    scheduler = Scheduler(session, Config, SchedulerLimits(max(rows, 1), speculate=speculate))
    scheduler._payoff.clock = session.clock
    for _ in range(rows):
        scheduler.add(text[:30].tolist(), SamplingParams(tokens, ignore_eos=True))
    made = {}
    while scheduler.busy:
        for event in scheduler.step():
            made.setdefault(event.request, []).append(event.token)
    assert all(answer == text[30 : 30 + tokens].tolist() for answer in made.values())
    return Ran(session.now, session.calls, scheduler.counters)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("each", [0.0, 0.1, 0.5])
def test_it_proposes_nearly_always_where_that_pays(rows, each):
    """Eight tokens in 1 + 7 * each seconds; one plain call in 64 is what the gain is held against."""
    off, lookup, auto = (ran(way, each, PERIODIC, rows) for way in ("off", "lookup", "auto"))
    assert off.seconds / lookup.seconds == pytest.approx(8 / (1 + 7 * each), rel=0.05)
    assert lookup.seconds <= auto.seconds <= 1.06 * lookup.seconds


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("each", [0.1, 0.5, 1.0])
def test_it_stops_where_hardly_anything_is_picked(rows, each):
    """2,000 calls: 8 with proposals, then after rests of 32, 64, ... 512 calls 8 again, and so on."""
    off, lookup, auto = (ran(way, each, RANDOM, rows) for way in ("off", "lookup", "auto"))
    assert 0 < lookup.counters.accepted < 0.02 * lookup.counters.drafted
    assert 0 < sum(tokens > 1 for tokens in auto.calls) <= 6 * 8
    assert auto.seconds <= off.seconds + 6 * 8 * 7 * each
    assert lookup.seconds > 1.4 * auto.seconds


def test_it_stops_where_proposals_are_picked_and_cost_more_than_they_save():
    """All of them are picked, but a call for eight tokens takes eleven times as long as one for one."""
    off, auto = (ran(way, 10 / 7, PERIODIC) for way in ("off", "auto"))
    assert auto.counters.accepted == auto.counters.drafted > 0
    assert max(auto.calls) == 8
    assert auto.seconds < 1.1 * off.seconds


def test_it_follows_a_text_that_changes():
    """Half of the answer repeats, half does not; whichever comes first."""
    for text in (
        np.concatenate([PERIODIC[:1030], RANDOM[1030:]]),
        np.concatenate([RANDOM[:1030], PERIODIC[1030:]]),
    ):
        off, lookup, auto = (ran(way, 0.3, text) for way in ("off", "lookup", "auto"))
        assert auto.seconds < 0.8 * min(off.seconds, lookup.seconds)
