"""The compiled sampler against numpy's: the same token, the same draws, the same log-probabilities, row for row."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.cpu.library import cpu_library
from deepseek_trt.plugins.cpu.sampler import load_sampler
from deepseek_trt.plugins.cpu.sampling_row import NOT_FINITE, unpack

VOCABULARIES = (3, 13, 64, 100, 257, 1500, 4096)
CHOICES = {
    "temperature": (0.0, 1e-9, 0.3, 1.0, 2.5),
    "top_k": (0, 0, 1, 2, 7, 50, 3000),
    "top_p": (1.0, 1.0, 0.999, 0.9, 0.5, 0.05),
    "min_p": (0.0, 0.0, 0.01, 0.3, 1.0),
    "repetition_penalty": (1.0, 1.0, 1.3, 0.8),
    "presence_penalty": (0.0, 0.0, 0.5),
    "frequency_penalty": (0.0, 0.0, 0.4),
    "min_tokens": (0, 2),
    "logprobs": (None, None, 0, 1, 5, 200),
}


@pytest.fixture(scope="module")
def native():
    library = cpu_library()
    if library.path is None:
        pytest.skip(library.reason)
    sampler = load_sampler(library.path)
    if sampler is None:
        pytest.skip("this processor has no AVX2")
    return sampler


def drawn_params(rng, rows):
    return [
        SamplingParams(8, seed=int(rng.integers(2**62)), **{n: v[rng.integers(len(v))] for n, v in CHOICES.items()})
        for _ in range(rows)
    ]


class Mask:
    """A guide that allows the same tokens for ever."""

    def __init__(self, allowed):
        words = np.zeros((len(allowed) + 31) // 32 * 32, dtype=np.uint8)
        words[: len(allowed)] = allowed
        self.words = np.packbits(words, bitorder="little").view(np.uint32)

    def prepare(self, row):
        row.mask = self.words.ctypes.data


def drawn_logits(rng, rows, vocab):
    """Wide and narrow ones, some with many ties, some with tokens that cannot come."""
    logits = (rng.normal(size=(rows, vocab)) * rng.choice([0.5, 3, 20])).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)
    if vocab > 20 and rng.random() < 0.3:
        logits[:, rng.integers(0, vocab, vocab // 3)] = -np.inf
    return logits


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_picks_what_numpy_picks(native, vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(12):
        params = drawn_params(rng, 16)
        prompt = rng.integers(0, vocab, 20).tolist()
        one, other = ([Sampler(p, prompt, [0, vocab - 1]) for p in params] for _ in range(2))
        for _ in range(6):
            logits = drawn_logits(rng, 16, vocab)
            expected, actual = sample_rows(one, logits), sample_rows(other, logits, native)
            assert [token for token, *_ in actual] == [token for token, *_ in expected]
            assert [s.row.draws for s in other] == [s.row.draws for s in one]
            for (_, got, got_top), (_, want, want_top) in zip(actual, expected, strict=True):
                got_tops, want_tops = unpack(got_top), unpack(want_top)
                assert [i for i, _ in got_tops] == [i for i, _ in want_tops]
                assert (got is None) == (want is None)
                values = ([own or 0.0, *(v for _, v in tops)] for own, tops in ((got, got_tops), (want, want_tops)))
                # the last steps are float64's: a sum in another order, another logarithm, and the largest logit added
                size = 20 + np.abs(logits).max(where=np.isfinite(logits), initial=0)
                np.testing.assert_allclose(*values, rtol=0, atol=4 * 2**-53 * size)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_masks_and_biases_pick_what_numpy_picks_and_leave_other_rows_as_they_were(native, vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(8):
        plain = drawn_params(rng, 12)
        params, masks = list(plain), [None] * 12
        for i in range(0, 12, 2):
            masks[i] = Mask(rng.random(vocab) < rng.choice([0.0, 0.02, 0.5, 1.0]))
            if i % 4:
                bias = {int(token): float(rng.normal() * 9) for token in rng.choice(vocab, min(3, vocab))}
                params[i] = dataclasses.replace(plain[i], logit_bias=bias)
        one, other = ([Sampler(p, [1, 2], [0], guide=m) for p, m in zip(params, masks, strict=True)] for _ in range(2))
        free = [Sampler(p, [1, 2], [0]) for p in plain]
        for _ in range(4):
            logits = drawn_logits(rng, 12, vocab)
            expected, actual = sample_rows(one, logits), sample_rows(other, logits, native)
            tokens = [token for token, *_ in actual]
            assert tokens == [token for token, *_ in expected]
            assert [s.row.draws for s in other] == [s.row.draws for s in one]
            assert tokens[1::2] == [token for token, *_ in sample_rows(free, logits, native)][1::2]
            for token, mask in zip(tokens[::2], masks[::2], strict=True):
                assert token == NOT_FINITE or mask.words[token // 32] >> (token % 32) & 1


def test_batch_and_order_change_nothing(native):
    rng = np.random.default_rng(0)
    params = drawn_params(rng, 24)
    alone, batch = ([Sampler(p, (1, 2, 3), (0, 4)) for p in params] for _ in range(2))
    for _ in range(5):
        logits = drawn_logits(rng, 24, 900)
        one = [sample_rows([s], logits[i : i + 1], native)[0] for i, s in enumerate(alone)]
        order = rng.permutation(24)
        shuffled = sample_rows([batch[i] for i in order], logits[order], native)
        assert [shuffled[list(order).index(i)] for i in range(24)] == one


@pytest.mark.parametrize("read_only", [False, True])
def test_logits_are_left_as_they_were_whatever_their_layout(native, read_only):
    given = np.random.default_rng(1).normal(size=(3, 400)).astype(np.float32)
    params = SamplingParams(temperature=1.0, presence_penalty=1.0, repetition_penalty=2.0, logprobs=2, min_tokens=5)
    for logits in (given, np.asfortranarray(given)):
        logits.flags.writeable = not read_only
        before = logits.copy()
        picked = [sample_rows([Sampler(params, (3, 7), (5, 7)) for _ in range(3)], logits, n) for n in (None, native)]
        assert [token for token, *_ in picked[0]] == [token for token, *_ in picked[1]]
        np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("vocab", [3, 100, 256, 1500])
@pytest.mark.parametrize("strange", ["all nan", "one nan", "last nan", "negative nan", "one inf", "all -inf", "least"])
def test_logits_that_are_not_finite_give_no_token_and_leave_the_row_as_it_was(native, vocab, strange):
    logits = np.random.default_rng(vocab).normal(size=(3, vocab)).astype(np.float32)
    bad = {"all nan": np.nan, "all -inf": -np.inf, "least": np.finfo(np.float32).min}
    if strange in bad:
        logits[1] = bad[strange]
    else:
        place = vocab - 1 if strange == "last nan" else vocab // 2
        logits[1, place] = np.inf if strange == "one inf" else np.nan
    if strange == "negative nan":
        logits.view(np.uint32)[1, vocab // 2] = 0xFFC00000  # what processors make
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0, "logprobs": 2}, {"frequency_penalty": 1.0}):
        params = SamplingParams(8, **{"temperature": 1.0, "seed": 5, **options})
        one, other = ([Sampler(params, (1, 2)) for _ in range(3)] for _ in range(2))
        expected, actual = sample_rows(one, logits), sample_rows(other, logits, native)
        assert [token for token, *_ in actual] == [token for token, *_ in expected]
        assert [token == NOT_FINITE for token, *_ in actual] == [False, True, False]
        assert [(s.made, s.row.draws) for s in other] == [(s.made, s.row.draws) for s in one]
        assert other[1].made == 0


def test_infinities_of_both_signs_are_told_from_nan(native):
    """-inf may come beside numbers: the fast test for NaN, a sum, must not take them for one."""
    logits = np.zeros((1, 512), dtype=np.float32)
    logits[0, :256], logits[0, 256:260], logits[0, 300] = -np.inf, 3e38, 3.1e38  # their sum overflows
    (choice,) = sample_rows([Sampler(SamplingParams(temperature=0.0))], logits, native)
    assert choice[0] == 300


def test_an_answer_that_goes_on_stays_within_its_memory(native):
    """More tokens than max_new_tokens, which a scheduler never asks for."""
    params = SamplingParams(2, temperature=50.0, frequency_penalty=0.5)
    samplers = [Sampler(params, (1,)) for _ in range(2)]
    logits = np.zeros((1, 64), dtype=np.float32)
    for _ in range(40):
        assert sample_rows(samplers[:1], logits) == sample_rows(samplers[1:], logits, native)
    assert samplers[1].row.seen_count == 3


@pytest.mark.usefixtures("native")
def test_threads_do_not_disturb_each_other():
    logits = np.random.default_rng(2).normal(size=(8, 2000)).astype(np.float32)
    params = SamplingParams(60, temperature=1.0, top_k=40, top_p=0.9, logprobs=3, presence_penalty=0.3)

    def run(made):
        native = load_sampler(cpu_library().path, threads=2)
        samplers = [Sampler(dataclasses.replace(params, seed=i)) for i in range(8)]
        made += [sample_rows(samplers, logits, native) for _ in range(50)]

    results: list[list] = [[] for _ in range(3)]
    threads = [threading.Thread(target=run, args=(made,)) for made in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 50


def test_a_library_without_a_sampler_is_left_alone(tmp_path):
    import ctypes.util

    assert load_sampler(Path(ctypes.util.find_library("m") or "libm.so.6")) is None


def test_seeds_are_taken_whole():
    with pytest.raises(RequestError):
        SamplingParams(seed=-1)
    near = [Sampler(SamplingParams(seed=s)).row.key for s in (0, 1, 2**32, 2**63)]
    assert len(set(near)) == 4
