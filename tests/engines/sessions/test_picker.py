"""Tokens picked on the GPU: those that the CPU picks of the same logits, without the logits leaving the stand-in."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling import Sampler
from deepseek_trt.export.errors import BackendError

_SPEC = importlib.util.spec_from_file_location("trt_world", Path(__file__).with_name("test_tensorrt.py"))
trt_world = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(trt_world)

PAGE = trt_world.PAGE
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9], list(range(11, 32))]  # the last takes two pieces of 16 tokens
PARAMS = [  # of each prompt; the last wants more likeliest tokens than the GPU gives: it is sampled on the CPU
    SamplingParams(7, temperature=0.8, top_k=40, top_p=0.9, seed=3, repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(6, logprobs=2, logit_bias={7: 3.0, 8: -50.0}, min_tokens=3),
    SamplingParams(5, temperature=1.2, min_p=0.05, seed=2**63, logprobs=40),
]


@pytest.fixture(scope="module")
def bundle(small_v2, bundle_of):
    return bundle_of(small_v2.checkpoint, dtype="float32", page_size=PAGE)


@pytest.fixture
def make_world(tmp_path, monkeypatch):
    def make(bundle, **changes):
        return trt_world.World(tmp_path, bundle, monkeypatch, dataclasses.replace(trt_world.SPEC, **changes))

    return make


@pytest.fixture
def world(make_world, bundle):
    return make_world(bundle)


def answers_of(session, config, limits=None, prompts=PROMPTS, params=PARAMS):
    llm = LLM(session, config, limits=limits or SchedulerLimits(4, 20, 16))
    return [(r.token_ids, r.logprobs, r.top_logprobs) for r in llm.generate(prompts, params)]


def on_the_cpu(session):
    session.holding = lambda: None
    return session


def assert_same(actual, expected):
    """Tokens exactly; log-probabilities differ in float64's last digits, as sums are taken in another order."""
    for (tokens, own, tops), (wanted_tokens, wanted_own, wanted_tops) in zip(actual, expected, strict=True):
        assert tokens == wanted_tokens
        assert (own is None) == (wanted_own is None)
        if own is not None:
            np.testing.assert_allclose(own, wanted_own, rtol=0, atol=1e-13)
            assert [[token for token, _ in top] for top in tops] == [[token for token, _ in top] for top in wanted_tops]


@pytest.mark.parametrize("speculate", ["off", "lookup"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_answers_are_those_of_the_cpu(world, speculate, cuda_graphs):
    """Prompts join while others decode, in pieces; rows of the CPU's and of the GPU's in one step; drafts."""
    limits = SchedulerLimits(4, 20, 16, speculate=speculate)
    config = world.bundle.manifest.model
    plain, session = (world.session(cuda_graphs=cuda_graphs) for _ in range(2))
    expected = answers_of(on_the_cpu(plain), config, limits)
    assert not {"sample_pick", "sample_adjust"} & set(world.device.calls)
    assert_same(answers_of(session, config, limits), expected)
    assert {"sample_pick", "sample_adjust"} <= set(world.device.calls)
    assert not world.device.queue, "a step must be over when its tokens are given"


def test_logits_stay_on_the_gpu(world):
    session, config = world.session(), world.bundle.manifest.model
    world.device.downloaded.clear()
    answers_of(session, config, prompts=PROMPTS[:2], params=[SamplingParams(8), SamplingParams(8, temperature=1.0)])
    assert world.device.downloaded
    row = config.vocab_size * 4
    assert max(world.device.downloaded) < row, "a token and a count of draws each"
    world.device.downloaded.clear()
    answers_of(session, config, prompts=PROMPTS[:1], params=[SamplingParams(3, logprobs=1)])
    assert len(world.device.downloaded) == 3


def test_prompts_in_pieces_are_held_whole(world):
    """45, 16 and 17 tokens through an engine for 16: logits of rows that end in different pieces."""
    lengths = np.array([45, 16, 17], dtype=np.int32)
    ids, none = np.arange(3 * 45).reshape(3, 45) % 250, np.zeros(3, dtype=np.int32)
    table = np.arange(1, 19, dtype=np.int32).reshape(3, 6)
    plain, session = (world.session() for _ in range(2))
    places = session.prefill_held(ids, lengths, none, table)
    np.testing.assert_array_equal(session.read(places), plain.prefill(ids, lengths, none, table))


def test_a_row_that_is_not_finite_ends_alone(world):
    session, config = world.session(), world.bundle.manifest.model
    held = session.prefill_held(
        np.array([[5], [6]]), *(np.array([1, 1], np.int32), np.zeros(2, np.int32), np.array([[1], [2]], np.int32))
    )
    samplers = [Sampler(SamplingParams(temperature=1.0)) for _ in range(2)]
    rows = [sampler.row for sampler in samplers]
    world.device.synchronize()
    address = session._logits_of("prefill")
    world.device.bytes_at(address, 4 * config.vocab_size).view(np.float32)[3] = np.nan
    (bad, *_), (good, *_) = session.pick(rows, held)
    assert (bad, rows[0].made, rows[0].draws) == (-1, 0, 0)
    assert (good >= 0, rows[1].made, rows[1].draws) == (True, 1, 1)


def test_more_rows_than_there_is_room_for_go_in_turns(world):
    session = world.session()
    given = np.full((4, 1), 7), np.ones(4, np.int32), np.zeros(4, np.int32), np.array([[1], [2], [3], [4]], np.int32)
    places = session.decode_held(*given)[:, 0]
    params = [SamplingParams(temperature=1.0, seed=seed, presence_penalty=1.0) for seed in range(9)]
    samplers = [[Sampler(p, (1, 2)) for p in params] for _ in range(2)]
    rows, others = ([sampler.row for sampler in of] for of in samplers)
    world.device.calls.clear()
    some = np.resize(places, 9)
    tokens = [token for token, *_ in session.pick(rows, some)]
    assert world.device.calls.count("sample_pick") == 3, "the engines were built for four rows"
    assert tokens == [session.pick([row], some[i : i + 1])[0][0] for i, row in enumerate(others)]


def test_what_fails_leaves_the_rows_as_they_were(world, monkeypatch):
    session = world.session()
    places = session.decode_held(np.array([[7]]), *(np.array([n], np.int32) for n in (1, 0)), np.array([[1]], np.int32))
    sampler = Sampler(SamplingParams(temperature=1.0, frequency_penalty=1.0), (1, 2))
    row = sampler.row
    before = bytes(row)

    def gone():
        raise BackendError("the GPU is gone")

    monkeypatch.setattr(world.device, "synchronize", gone)
    with pytest.raises(BackendError, match="gone"):
        session.pick([row], places[0])
    assert bytes(row) == before


@pytest.mark.parametrize(
    ("sm", "refused", "target", "said"),
    [
        (86, "nothing", "sm86", ""),
        (89, "nothing", "sm86", ""),
        (
            86,
            "sm86",
            "sm80",
            "Sampling runs binaries for SM 80, slower than it could: better code does not load (the GPU",
        ),
        (
            86,
            '"sm',
            "ptx80",
            "Sampling runs PTX for SM 80, slower than it could: better code does not load (the GPU refu",
        ),
    ],
)
def test_kernels_of_the_chip_come_first_and_ptx_last(world, sm, refused, target, said):
    world.write_library(sms=(80, 86), ptx_sms=(80,))
    for graph in ("prefill", "decode"):
        world.change(graph, plugin_library_sha256=world.library_sha256)
    world.device.sm, world.device.refuse_kernels = sm, refused
    session = world.session()
    assert world.device.targets == [target] * 2
    assert said in session.note
    assert ("Sampling runs" in session.note) == bool(said)


LEFT_TO_THE_CPU = {  # why, and how the note says it
    "an older library": "gives no Sampling kernels .*run deepseek-trt plugins, then deepseek-trt build",
    "a driver that refuses them": "gives no Sampling kernels .*cuModuleLoadData",
    "plans that carry their library": "the plans carry their plugin library",
    "all logits": "the bundle gives logits of every token",
}


@pytest.mark.parametrize("why", LEFT_TO_THE_CPU)
def test_where_the_gpu_does_not_sample_the_note_says_why(make_world, bundle, bundle_of, small_v2, why):
    options = {"embed_plugins": True} if why == "plans that carry their library" else {}
    if why == "all logits":
        bundle = bundle_of(small_v2.checkpoint, dtype="float32", page_size=PAGE, all_logits=True)
    world = make_world(bundle, **options)
    if why == "an older library":
        world.write_library(sampling=False)
        for graph in ("prefill", "decode"):
            world.change(graph, plugin_library_sha256=world.library_sha256)
    world.device.refuse_kernels = "sample_pick" if why == "a driver that refuses them" else "nothing"
    session = world.session()
    assert session.holding() is None
    assert session.note.count("tokens are sampled on the CPU, to which all logits are copied: ") == 1
    assert re.search(LEFT_TO_THE_CPU[why], session.note)
    assert len(answers_of(session, world.bundle.manifest.model, prompts=[[5]], params=[SamplingParams(2)])[0][0]) == 2
