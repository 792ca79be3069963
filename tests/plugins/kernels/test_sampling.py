"""The sampling kernels against numpy's sampler: the same tokens, the same draws, the same log-probabilities."""

import numpy as np
import pytest
import torch

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler, sample_rows
from deepseek_trt.plugins.cpu.sampling_row import NOT_FINITE, unpack
from deepseek_trt.plugins.kernels import tiles
from deepseek_trt.plugins.kernels.launches import SAMPLING_TOPS
from deepseek_trt.plugins.kernels.sampling import batch
from deepseek_trt.plugins.kernels.sampling import run as runner

CASES = [(3, 0), (13, 0), (100, 0), (200, 64), (700, 0)]  # tokens, and logits in a block: 0 for all
ROWS, STEPS = 8, 2
CHOICES = {
    "temperature": (0.0, 1e-9, 0.3, 1.0, 2.5),
    "top_k": (0, 0, 1, 2, 7, 50, 3000),
    "top_p": (1.0, 1.0, 0.999, 0.9, 0.5, 0.05),
    "min_p": (0.0, 0.0, 0.01, 0.3, 1.0),
    "repetition_penalty": (1.0, 1.0, 1.3, 0.8),
    "presence_penalty": (0.0, 0.0, 0.5),
    "frequency_penalty": (0.0, 0.0, 0.4),
    "min_tokens": (0, 2),
    "logprobs": (None, None, 0, 1, 5, 20),
}


@pytest.fixture
def in_pieces(monkeypatch):
    """Rows in several blocks, as on a GPU, where the interpreter would take each at once."""

    def cut(block):
        monkeypatch.setattr(runner, "sample_pick_tile", lambda vocab, sm: tiles.tile(BLOCK=block, ROWS=1))
        monkeypatch.setattr(runner, "sample_adjust_tile", lambda sm: tiles.tile(BLOCK=8))

    return cut


def drawn_params(rng, rows, vocab):
    made = []
    for _ in range(rows):
        options = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
        if rng.random() < 0.3:
            tokens = rng.choice(vocab, min(3, vocab), replace=False)
            options["logit_bias"] = {int(token): float(rng.normal() * 9) for token in tokens}
        made.append(SamplingParams(8, seed=int(rng.integers(2**62)), **options))
    return made


def drawn_logits(rng, rows, vocab):
    """Wide and narrow ones, some with many ties, some with zeros of both signs, some with tokens that cannot come."""
    logits = (rng.normal(size=(rows, vocab)) * rng.choice([0.5, 3, 20], size=(rows, 1))).astype(np.float32)
    tied, few = rng.random(rows) < 0.3, rng.random(rows) < 0.2
    logits[tied] = np.round(logits[tied])
    if vocab > 20:
        logits[few, : vocab // 2] = -np.inf
    return logits


def assert_same(actual, expected, logits):
    """Tokens exactly; of log-probabilities the last steps are float64's: a sum in another order, another logarithm."""
    assert [token for token, *_ in actual] == [token for token, *_ in expected]
    size = 20 + np.abs(logits).max(where=np.isfinite(logits), initial=0)
    for (_, got, got_top), (_, want, want_top) in zip(actual, expected, strict=True):
        got_tops, want_tops = unpack(got_top), unpack(want_top)
        assert [token for token, _ in got_tops] == [token for token, _ in want_tops]
        assert (got is None) == (want is None)
        values = ([own or 0.0, *(v for _, v in tops)] for own, tops in ((got, got_tops), (want, want_tops)))
        np.testing.assert_allclose(*values, rtol=0, atol=4 * 2**-53 * size)


@pytest.mark.parametrize(("vocab", "block"), CASES)
def test_picks_what_numpy_picks(vocab, block, device, in_pieces):
    rng = np.random.default_rng([vocab, block])
    if block:
        in_pieces(block)
    params = drawn_params(rng, ROWS, vocab)
    prompt, stops = rng.integers(0, vocab, 20).tolist(), [0, vocab - 1]
    one, other = ([Sampler(p, prompt, stops) for p in params] for _ in range(2))
    for _ in range(STEPS):
        logits = drawn_logits(rng, ROWS, vocab)
        expected = sample_rows(one, logits)
        actual = runner.run([s.row for s in other], torch.from_numpy(logits).to(device))
        assert_same(actual, expected, logits)
        for a, b in zip(other, one, strict=True):
            assert (a.row.draws, a.row.made, a.row.seen_count) == (b.row.draws, b.row.made, b.row.seen_count)


def options_of(row):
    return SamplingParams(8, **{"temperature": 1.0, "seed": 5, **row})


@pytest.mark.parametrize("strange", ["all nan", "one nan", "last nan", "one inf", "all -inf", "least"])
def test_logits_that_are_not_finite_give_no_token_and_leave_the_row_as_it_was(strange, device):
    vocab = 40
    logits = np.random.default_rng(1).normal(size=(3, vocab)).astype(np.float32)
    bad = {"all nan": np.nan, "all -inf": -np.inf, "least": np.finfo(np.float32).min}
    if strange in bad:
        logits[1] = bad[strange]
    else:
        logits[1, vocab - 1 if strange == "last nan" else 7] = np.inf if strange == "one inf" else np.nan
    for options in ({"top_k": 2}, {"temperature": 0.0, "logprobs": 2}, {"frequency_penalty": 1.0}):
        one, other = ([Sampler(options_of(options), (1, 2)) for _ in range(3)] for _ in range(2))
        expected = sample_rows(one, logits)
        actual = runner.run([s.row for s in other], torch.from_numpy(logits).to(device))
        assert [token for token, *_ in actual] == [token for token, *_ in expected]
        assert actual[1] == (NOT_FINITE, None, b"")
        assert (other[1].row.made, other[1].row.draws, other[1].row.seen_count) == (0, 0, one[1].row.seen_count)


EDGES = {  # what decides by a hair
    "all are equal": (np.zeros(50), {"top_k": 7, "top_p": 0.4}),
    "zeros of both signs": (np.where(np.arange(50) % 2, 0.0, -0.0), {"top_k": 9}),
    "ties at the end of top-k": (np.repeat([3.0, 2.0, 1.0], [2, 30, 18]), {"top_k": 11}),
    "fewer than top-k are possible": (np.where(np.arange(50) < 4, 1.0, -np.inf), {"top_k": 20, "top_p": 0.9}),
    "the smallest top-p": (np.linspace(-1, 1, 50), {"top_p": 1e-9}),
    "the largest min-p": (np.repeat([1.0, 2.0], 25), {"min_p": 1.0}),
    "hardly warm": (np.linspace(-1, 1, 50), {"temperature": 1e-30}),
    "as flat as can be": (np.linspace(-1, 1, 50), {"temperature": 1e38}),
    "near float32's largest": (np.linspace(-3e38, 3e38, 50), {"top_k": 40}),
}


@pytest.mark.parametrize(("logits", "options"), EDGES.values(), ids=EDGES.keys())
def test_edges(logits, options, device):
    given = np.stack([logits.astype(np.float32)] * 6)
    samplers = [[Sampler(options_of({**options, "seed": seed})) for seed in range(6)] for _ in range(2)]
    expected = sample_rows(samplers[0], given)
    actual = runner.run([s.row for s in samplers[1]], torch.from_numpy(given).to(device))
    assert_same(actual, expected, given)
    assert [s.row.draws for s in samplers[1]] == [s.row.draws for s in samplers[0]]


def test_all_tokens_banned_gives_the_first_as_numpy_does(device):
    params = [
        options_of({"min_tokens": 4, **more}) for more in ({}, {"temperature": 0.0}, {"top_k": 3}, {"min_p": 0.1})
    ]
    samplers = [[Sampler(p, (), range(20)) for p in params] for _ in range(2)]
    logits = np.random.default_rng(3).normal(size=(4, 20)).astype(np.float32)
    expected = sample_rows(samplers[0], logits)
    assert runner.run([s.row for s in samplers[1]], torch.from_numpy(logits).to(device)) == expected


def test_rows_read_the_logits_of_their_places(device):
    logits = np.random.default_rng(4).normal(size=(7, 60)).astype(np.float32)
    places, params = [5, 0, 6], options_of({"presence_penalty": 1.5, "top_k": 9})
    samplers = [[Sampler(params, (3, 4)) for _ in places] for _ in range(2)]
    expected = sample_rows(samplers[0], logits[places])
    given = torch.from_numpy(logits).to(device)
    assert runner.run([s.row for s in samplers[1]], given, places) == expected
    assert np.array_equal(given.cpu().numpy(), logits), "the logits are left as they were"


@pytest.mark.usefixtures("memory_watch")
def test_reads_and_writes_its_own_memory_alone(device, in_pieces):
    in_pieces(16)
    options = {"presence_penalty": 1.5, "top_k": 9, "top_p": 0.7, "logprobs": 2, "repetition_penalty": 1.1}
    samplers = [[Sampler(options_of({**options, "seed": seed}), (3, 36)) for seed in range(2)] for _ in range(2)]
    logits = np.random.default_rng(6).normal(size=(2, 37)).astype(np.float32)
    actual = runner.run([s.row for s in samplers[1]], torch.from_numpy(logits).to(device))
    assert_same(actual, sample_rows(samplers[0], logits), logits)


def test_what_the_kernels_leave_to_the_cpu():
    plain = Sampler(options_of({"logprobs": SAMPLING_TOPS, "frequency_penalty": 0.5}), [1] * 50, room=100)
    assert batch.takes(plain.row)
    assert not batch.takes(Sampler(options_of({"logprobs": SAMPLING_TOPS + 1})).row)
    history = Sampler(options_of({"frequency_penalty": 0.5}), range(batch.MOST_CHANGES + 1), room=100)
    assert not batch.takes(history.row)
    plain.row.mask = plain.address
    assert not batch.takes(plain.row)
