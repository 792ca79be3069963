"""Sampling: what each parameter leaves, how often tokens come, and that the batch changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows, with_logprobs
from deepseek_trt.engines.generation.sampling_numpy import adjusted
from deepseek_trt.engines.text.stops import StopText
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.cpu.sampling_row import unpack

RNG = np.random.default_rng(7)
DRAWS = 6000
# Of a log-probability: each exponential is off by 1e-7 of itself (its polynomial), by the rounding of its argument,
# log2(e) times a difference of logits below 32 here: 32 * 2^-24, and by 2^-30 as an integer.
ROUNDING = 1e-7 + 32 * 2**-24 + 4 * 2**-30
P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])
LOGITS = np.log(P).astype(np.float32)


def pick(sampler, logits):
    return sample_rows([sampler], logits[None])[0][0]


def expected(p, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution after temperature, top-k, top-p and min-p, one token at a time."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    held, mass = [], sum(p[i] for i in order)
    for i in order:
        if sum(p[j] for j in held) < top_p * mass - 1e-12 and p[i] >= min_p * p.max():
            held.append(i)
    kept = np.zeros_like(p)
    kept[held] = p[held]
    return kept / kept.sum()


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_p": 0.35},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.3},
    {"top_p": 0.95, "min_p": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies(options):
    """Each token's count lies within 5 standard deviations of a binomial; a token that is cut off never comes."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, **options}))
    counts = np.bincount([pick(sampler, LOGITS) for _ in range(DRAWS)], minlength=len(P))
    want = expected(P, **options)
    assert (counts[want == 0] == 0).all()
    assert (np.abs(counts - DRAWS * want) <= 5 * np.sqrt(DRAWS * want * (1 - want))).all()


def test_frequencies_of_a_nucleus_wider_than_the_first_candidates():
    """3,000 tokens, nearly equal: top-p 0.5 keeps about half of them, more than are looked at first."""
    p = RNG.permutation(np.linspace(1.0, 1.1, 3000))
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.5))
    picks = np.array([pick(sampler, np.log(p).astype(np.float32)) for _ in range(400)])
    want = expected(p, top_p=0.5)
    edge = 3 / 3000 * p.max()  # float32 logits may move the edge by a few tokens
    low = np.sort(p[want > 0])[0] - edge
    assert (p[picks] >= low).all()
    share = (p[picks] >= np.median(p[want > 0])).mean()
    exact = want[p >= np.median(p[want > 0])].sum()
    assert abs(share - exact) < 5 * math.sqrt(exact * (1 - exact) / 400)


KINDS = (
    SamplingParams(),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.0, top_k=7),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.9),
    SamplingParams(temperature=1.2, top_p=0.8),
    SamplingParams(temperature=2.0, top_p=0.999),
    SamplingParams(temperature=0.9, min_p=0.1),
    SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    SamplingParams(temperature=1.0, min_tokens=5, logprobs=3),
)


def samplers(kinds):
    return [Sampler(dataclasses.replace(k, seed=i), (1, 2, 3), (0, 4)) for i, k in enumerate(kinds)]


def test_batch_and_order_change_nothing():
    """Coarse logits, so that ties come up, over a vocabulary wider than the first candidates of top-p."""
    kinds = KINDS * 3
    steps = [(RNG.integers(-12, 12, (len(kinds), 1500)) / 4).astype(np.float32) for _ in range(6)]
    alone = samplers(kinds)
    batch = samplers(kinds)
    mixed = samplers(kinds)
    for logits in steps:
        one = [sample_rows([s], logits[i : i + 1])[0] for i, s in enumerate(alone)]
        assert sample_rows(batch, logits) == one
        order = RNG.permutation(len(kinds))
        shuffled = sample_rows([mixed[i] for i in order], logits[order])
        assert [shuffled[list(order).index(i)] for i in range(len(kinds))] == one


def test_seeds_differ():
    flat = np.zeros(50, dtype=np.float32)
    runs = {
        tuple(pick(s, flat) for _ in range(8)) for s in (Sampler(SamplingParams(temperature=1, seed=n)) for n in (1, 2))
    }
    again = Sampler(SamplingParams(temperature=1, seed=1))
    assert len(runs) == 2
    assert tuple(pick(again, flat) for _ in range(8)) in runs


def test_logits_are_left_as_they_were():
    logits = RNG.normal(size=(len(KINDS), 300)).astype(np.float32)
    logits.flags.writeable = False
    sample_rows(samplers(KINDS), logits)


def test_tiny_temperature_is_greedy_and_top_k_1_too():
    logits = np.array([0.0, 5.0, 5.0, 1.0], dtype=np.float32)
    assert pick(Sampler(SamplingParams(temperature=1.0, top_k=1)), logits) == 1
    assert pick(Sampler(SamplingParams(temperature=1e-9)), logits) in (1, 2)
    assert pick(Sampler(SamplingParams(temperature=1.0, top_k=100)), logits) in range(4)


def test_infinitely_unlikely_tokens_never_come():
    logits = np.full(600, -np.inf, dtype=np.float32)
    logits[[3, 500]] = 0.0
    for params in ({}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.01}):
        sampler = Sampler(SamplingParams(temperature=1.0, **params))
        assert {pick(sampler, logits) for _ in range(60)} == {3, 500}


def test_penalties():
    """Of prompt and answer for repetition, of the answer alone for the others."""
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, prompt=(0, 1))
    for token in (2, 2, 3):
        sampler.row.record(token)
    got = adjusted(sampler.row, np.array([4.0, -4.0, 4.0, -4.0, 4.0], dtype=np.float32))
    assert got.tolist() == [2.0, -8.0, 2.0 - 0.5 - 0.5, -8.0 - 0.5 - 0.25, 4.0]


def test_no_stop_before_min_tokens():
    logits = np.array([[9.0, 1.0, 0.0]], dtype=np.float32)
    sampler = Sampler(SamplingParams(min_tokens=2), stops=(0,))
    assert [sample_rows([sampler], logits)[0][0] for _ in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("count", [0, 1, 3, 99])
def test_logprobs(count):
    logits = np.array([1.0, 3.0, 2.0, 3.0], dtype=np.float32)
    want = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    token, logprob, top = with_logprobs(logits, 2, count)
    assert token == 2
    assert logprob == pytest.approx(want[2], abs=ROUNDING)
    likeliest = unpack(top)
    assert [i for i, _ in likeliest] == [1, 3, 2, 0][:count]
    assert [value for _, value in likeliest] == pytest.approx([want[i] for i, _ in likeliest], abs=ROUNDING)


def test_logprobs_are_of_the_model_itself():
    params = SamplingParams(temperature=0.3, logprobs=0, presence_penalty=2.0)
    ((token, logprob, _),) = sample_rows([Sampler(params, (0,))], LOGITS[None])
    assert logprob == pytest.approx(math.log(P[token]), abs=1e-6)
    assert sample_rows([Sampler(SamplingParams())], LOGITS[None])[0][1] is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"stop": ("a", "")},
        {"stop_token_ids": (3, -1)},
        {"min_tokens": -1},
        {"min_tokens": 200},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_bad_parameters_name_field_and_value(options):
    ((field, value),) = options.items()
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert f"{field} {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        ((), ["a", "b"], "ab", False),
        (("END",), ["some E", "ND more"], "some ", True),
        (("END",), ["E", "N", "E", "N", "D"], "EN", True),
        (("END",), ["it is the EN"], "it is the EN", False),
        (("\n\n", "stop"), ["a\n", "b sto", "w\n", "\n", "c"], "a\nb stow", True),
        (("aab",), ["a", "a", "a", "b"], "a", True),
        (("b", "abc"), ["a", "bc"], "a", True),
        (("x",), ["", "", "axb"], "a", True),
    ],
)
def test_stop_strings(stops, pieces, shown, found):
    text = StopText(stops)
    passed = []
    for piece in pieces:
        passed.append(text.push(piece))
        if text.found:
            break
    assert "".join(passed) + text.flush() == shown
    assert text.found == found


@settings(max_examples=150, deadline=None, database=None)
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_how_text_is_cut_into_pieces_does_not_matter(whole, stops, cuts):
    def shown(borders):
        text = StopText(stops)
        return "".join(text.push(whole[a:b]) for a, b in itertools.pairwise(borders)) + text.flush(), text.found

    letters = shown(range(len(whole) + 1))
    assert shown([0, *sorted(cuts), len(whole) + 12]) == letters
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert letters == ((whole[: min(ends)[1]], True) if ends else (whole, False))


def test_text_that_may_be_a_stop_is_held_back_and_no_more():
    text = StopText(("END",))
    assert [text.push(p) for p in ("abcE", "N", "x", "E")] == ["abc", "", "ENx", ""]
    assert text.flush() == "E"


def test_unarmed_text_is_not_searched():
    text = StopText(("a",))
    assert text.push("banana", armed=False) == "banana"
    assert not text.found
    assert text.push("bat") == "b"
    assert text.push("more") == ""
