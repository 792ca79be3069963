"""Sampled speculation draws as the plain sampler does: with the same seeds the same tokens, by either sampler.

So the distribution is the plain one's, which is counted all the same: of all draws, and of those alone that follow a
proposed token in its own step.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.plugins.cpu.library import cpu_library
from deepseek_trt.plugins.cpu.sampler import load_sampler

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

VOCAB, ROWS, LENGTH = 8, 200, 1000  # 200,000 draws
LOGITS = np.random.default_rng(3).normal(0, 0.9, (VOCAB, VOCAB)).astype(np.float32)  # by the token before
WHOLE = {"temperature": 0.9}
CUT = {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.02}
PENALISED = {"temperature": 1.1, "repetition_penalty": 1.05, "presence_penalty": 0.3, "frequency_penalty": 0.001}


class Config(fake.Config):
    vocab_size = VOCAB
    max_position_embeddings = LENGTH + 2
    eos_token_ids = ()


class Chain(Session):
    """The next token's logits depend on the last token alone."""

    backend, note = "chain", ""
    cache = CacheSpec(1, 64, 1, "float32")
    pages = 1 + ROWS * -(-(LENGTH + 2) // 64)

    def __init__(self, library):
        self.library = library

    def prefill(self, input_ids, sequence_lengths, past_lengths, page_table):
        return LOGITS[input_ids[np.arange(len(input_ids)), sequence_lengths - 1]]

    def decode(self, input_ids, sequence_lengths, past_lengths, page_table):
        return LOGITS[input_ids]


def library_of(kind):
    if kind == "numpy":
        return None
    library = cpu_library()
    if library.path is None or load_sampler(library.path) is None:
        pytest.skip(library.reason or "this processor has no AVX2")
    return library.path


def params_of(row):
    options = (WHOLE, WHOLE, CUT, CUT, PENALISED)[row % 5]
    return SamplingParams(LENGTH, seed=row, ignore_eos=True, **options)


def plain_tokens(native):
    """Tokens [ROWS, LENGTH] of the sampler alone, a draw of every row at a time."""
    samplers = [Sampler(params_of(row), (row % VOCAB,)) for row in range(ROWS)]
    last, made = np.arange(ROWS) % VOCAB, np.empty((LENGTH, ROWS), dtype=np.int64)
    for step in range(LENGTH):
        made[step] = last = np.array([token for token, *_ in sample_rows(samplers, LOGITS[last], native)])
    return made.T


def speculated(library):
    """Tokens [ROWS, LENGTH], and which of them followed a proposed token in its own step."""
    limits = SchedulerLimits(ROWS, 8 * ROWS, prefix_reuse=False, speculate="lookup")
    scheduler = Scheduler(Chain(library), Config, limits)
    for row in range(ROWS):
        assert scheduler.add((row % VOCAB,), params_of(row)) == row
    made, later = [[] for _ in range(ROWS)], [[] for _ in range(ROWS)]
    while scheduler.busy:
        seen = set()
        for event in scheduler.step():
            made[event.request].append(event.token)
            later[event.request].append(event.request in seen)
            seen.add(event.request)
    return np.array(made), np.array(later), scheduler.counters


def chances(options):
    """Of each next token after each one [VOCAB, VOCAB], by the definitions of temperature, top-k, top-p and min-p."""
    p = np.exp(LOGITS.astype(np.float64) / options["temperature"])
    p /= p.sum(axis=1, keepdims=True)
    for row in p:
        order = np.argsort(-row, kind="stable")[: options.get("top_k", VOCAB)]
        held = np.cumsum(row[order]) - row[order] < options.get("top_p", 1.0) * row[order].sum()
        kept = order[held & (row[order] >= options.get("min_p", 0.0) * row.max())]
        row[np.setdiff1d(np.arange(VOCAB), kept)] = 0
    return p / p.sum(axis=1, keepdims=True)


def check_chi_square(before, after, options):
    """Pearson's sum over all pairs lies within five standard deviations; a token that is cut off never comes."""
    counts, p = np.zeros((VOCAB, VOCAB)), chances(options)
    np.add.at(counts, (before, after), 1)
    expected = counts.sum(axis=1, keepdims=True) * p
    assert (counts[p == 0] == 0).all()
    assert expected[p > 0].min() > 1  # Cochran's rule for the sum to be chi-square's
    assert (expected[p > 0] < 5).mean() < 0.2
    statistic = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum()
    freedom = int((p > 0).sum()) - VOCAB
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
    return len(before)


@pytest.mark.parametrize("kind", ["numpy", "native"])
def test_200_000_draws_are_the_plain_samplers(kind):
    library = library_of(kind)
    plain = plain_tokens(load_sampler(library) if library else None)
    made, later, counters = speculated(library)
    assert np.array_equal(made, plain)
    assert made.size == 200_000
    assert counters.accepted > 20_000
    assert counters.drafted - counters.accepted > 20_000
    before = np.concatenate([np.arange(ROWS)[:, None] % VOCAB, made[:, :-1]], axis=1)
    for start, options in ((0, WHOLE), (2, CUT)):
        rows = [row for row in range(ROWS) if row % 5 in (start, start + 1)]
        check_chi_square(before[rows].ravel(), made[rows].ravel(), options)
        accepted = later[rows]
        assert check_chi_square(before[rows][accepted], made[rows][accepted], options) > 5000


def test_the_count_would_show_a_bias():
    """Of one token in fifty that is replaced by the likeliest."""
    rng, p = np.random.default_rng(1), chances(WHOLE)
    before = rng.integers(0, VOCAB, 80_000)
    after = np.array([rng.choice(VOCAB, p=p[token]) for token in before])
    check_chi_square(before, after, WHOLE)
    replaced = rng.random(len(after)) < 0.02
    after[replaced] = p.argmax(axis=1)[before[replaced]]
    with pytest.raises(AssertionError):
        check_chi_square(before, after, WHOLE)
