"""Requests made to hurt: each is an error of its own, and what its neighbour gets is what it gets alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.stream import Failure
from deepseek_trt.engines.text.stops import StopText
from deepseek_trt.export.errors import RequestError

ENGINES = Path(__file__).parents[1] / "engines"


def _load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = _load("fake_session_of_requests", ENGINES / "fake_session.py")
served = _load("service_of_requests", ENGINES / "serving" / "test_service.py")
NEIGHBOUR = ((3, 4, 5), SamplingParams(20, ignore_eos=True, temperature=0.8, seed=7, repetition_penalty=1.2))
DIGITS = 10**6000


def llm_of(config=fake.Config):
    return LLM(fake.FakeSession(40), config, None, SchedulerLimits(4, 16, 8))


@pytest.fixture(scope="module")
def alone():
    """The neighbour's tokens without anybody beside it."""
    return llm_of().generate([NEIGHBOUR[0]], NEIGHBOUR[1])[0].token_ids


@contextlib.contextmanager
def neighbour(llm, alone):
    """The neighbour runs in the engine's thread while the body does its worst."""
    made, done = [], threading.Event()

    def put(event):
        made.append(event)
        if isinstance(event, Exception) or event.finished:
            done.set()

    llm.start()
    llm.submit(*NEIGHBOUR, put)
    yield
    assert done.wait(20)
    assert not any(isinstance(event, Exception) for event in made), made[-1]
    assert tuple(event.token for event in made) == alone


class Odd:
    """Has an index and a number, and no repr."""

    def __index__(self):
        return 3

    def __float__(self):
        return 0.5

    def __repr__(self):
        raise OSError("no")


NOT_INTS = (True, 1.5, "1", None, math.nan, -1, Odd(), [], np.float32(2), -DIGITS, b"1")
NOT_FLOATS = (True, "1", None, math.nan, math.inf, -math.inf, -3, DIGITS, Odd(), [1.0], 1j, -DIGITS)
WRONG = {
    "max_new_tokens": (*NOT_INTS, 0, 2**31, DIGITS),
    "min_tokens": (*NOT_INTS, 2**31, DIGITS, 129),
    "top_k": NOT_INTS,
    "seed": (*NOT_INTS, 2**64, DIGITS),
    "logprobs": (*(v for v in NOT_INTS if v is not None), 2**31, DIGITS),
    "max_tokens": (*(v for v in NOT_INTS if v is not None), 0, 2**31, DIGITS),
    "temperature": NOT_FLOATS,
    "top_p": (*NOT_FLOATS, 0, 1.0001),
    "min_p": (*NOT_FLOATS, 1.0001),
    "repetition_penalty": (*NOT_FLOATS, 0, 1e-300, 1e300),
    "presence_penalty": (*NOT_FLOATS, 2.1),
    "frequency_penalty": (*NOT_FLOATS, 2.1),
    "ignore_eos": (0, 1, "no", None, Odd()),
    "stop": (None, 3, ("",), (b"x",), ("a" * 1025,), ("a",) * 129, ["\ud800"], {"a": 1}, "a" * 10**7, (Odd(),), ""),
    "stop_token_ids": (None, 3, (True,), (-1,), (1.0,), ("1",), (Odd(),), (None,), {1: 2}, (-DIGITS,)),
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_values_are_refused_where_params_are_made(field):
    for value in WRONG[field]:
        with pytest.raises(RequestError, match=field.replace("max_", "max_(new_)?")) as refused:
            SamplingParams(**{field: value})
        assert len(str(refused.value)) < 400


def test_two_names_for_one_length():
    assert SamplingParams(max_tokens=5).max_new_tokens == 5
    assert SamplingParams(128, max_tokens=128).max_new_tokens == 128
    for given in (128, 5, 64):
        with pytest.raises(RequestError, match="leave out one of them"):
            SamplingParams(given, max_tokens=6)
    assert dataclasses.replace(SamplingParams(), max_tokens=5).max_new_tokens == 5
    assert dataclasses.replace(SamplingParams(64), temperature=1.0).max_new_tokens == 64
    assert dataclasses.replace(SamplingParams(top_k=2), top_k=3) == SamplingParams(top_k=3)
    with pytest.raises(RequestError, match="leave out one of them"):
        dataclasses.replace(SamplingParams(64), max_tokens=5)
    defaults = SamplingDefaults((("max_new_tokens", 2048),))
    assert defaults.params(max_tokens=5).max_new_tokens == defaults.params(max_new_tokens=5).max_new_tokens == 5
    assert defaults.params().max_new_tokens == 2048


EXTREMES = {
    "the longest answer": SamplingParams(2**31 - 1, repetition_penalty=1.2),
    "the largest penalty": SamplingParams(5, repetition_penalty=1e6, presence_penalty=2, frequency_penalty=-2),
    "the smallest penalty": SamplingParams(5, repetition_penalty=1e-6),
    "hot": SamplingParams(5, temperature=1e308),
    "cold": SamplingParams(5, temperature=1e-320),
    "top_k": SamplingParams(5, temperature=1.0, top_k=DIGITS),
    "top_p": SamplingParams(5, temperature=1.0, top_p=5e-324, min_p=1.0),
    "seed": SamplingParams(5, temperature=1.0, seed=2**64 - 1),
    "logprobs": SamplingParams(5, logprobs=2**31 - 1),
    "stop tokens": SamplingParams(5, stop_token_ids=tuple(range(13)) * 1000),
    "stop tokens that wait": SamplingParams(5, stop_token_ids=tuple(range(12)), min_tokens=5, ignore_eos=True),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_values_are_answered_beside_a_neighbour(name, alone):
    with llm_of() as llm, neighbour(llm, alone):
        result = asyncio.run(asyncio.wait_for(llm.agenerate([(2, 3)], EXTREMES[name]), 20))[0]
        assert 1 <= len(result.token_ids) <= 38
        assert all(0 <= token < fake.VOCAB for token in result.token_ids)


def test_the_hottest_temperature_is_no_greedy_answer():
    wide = dataclasses.replace(EXTREMES["hot"], max_new_tokens=30, ignore_eos=True, seed=3)
    assert len(set(llm_of().generate([(2, 3)], wide)[0].token_ids)) > 6


class Huge(fake.Config):
    """A model whose config promises a context that no memory holds."""

    max_position_embeddings = 2**40


def test_room_for_a_history_is_what_the_pages_hold():
    with pytest.raises(RequestError, match="cache pages"):
        llm_of(Huge).generate([(2, 3)], SamplingParams(2**31 - 1, repetition_penalty=1.2))


@pytest.mark.parametrize(
    "prompt",
    [
        (), (True, 2), (1.0,), (13,), (-1,), (DIGITS,), b"ab", bytearray(b"ab"), {2: 3}, {2, 3}, (None,), "text",
        range(40), (2, (3,)), 5, None, ["2"], (Odd,), np.float32([2]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)  # fmt: skip
def test_prompts_are_refused_beside_a_neighbour(prompt, alone):
    with llm_of() as llm, neighbour(llm, alone):
        with pytest.raises(RequestError) as refused:
            llm.generate([prompt], SamplingParams(4))
        with pytest.raises(RequestError):
            asyncio.run(asyncio.wait_for(llm.agenerate([prompt], SamplingParams(4)), 20))
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("prompts", ["text", b"text"])
def test_one_text_is_no_list_of_prompts(prompts):
    with pytest.raises(RequestError, match="give a list"):
        llm_of().generate(prompts)


@pytest.mark.parametrize("error", [ValueError, SystemExit, GeneratorExit, asyncio.CancelledError, MemoryError])
@pytest.mark.parametrize("at", [1, 3, 20])
def test_what_a_callback_raises_is_its_own_callers(error, at, alone):
    """Whoever of the two makes the step."""
    llm, results = llm_of(), {}
    both = threading.Barrier(2)

    def bad():
        calls = iter(range(1, 99))

        def on_token():
            if next(calls) == at:
                raise error("mine")

        both.wait()
        try:
            llm.generate([(2, 3)], SamplingParams(30, ignore_eos=True), on_token)
        except BaseException as raised:
            results["bad"] = raised

    def good():
        both.wait()
        results["good"] = llm.generate([NEIGHBOUR[0]], NEIGHBOUR[1])[0].token_ids

    threads = [threading.Thread(target=each) for each in (bad, good)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert type(results["bad"]) is error
    assert results["good"] == alone
    assert llm.scheduler.pool.free == 39
    assert not llm.scheduler.busy


def test_a_put_that_raises_ends_its_own_request(alone):
    def put(event):
        raise OSError("no place")

    with llm_of() as llm, neighbour(llm, alone):
        ticket = llm.submit((2, 3), SamplingParams(30, ignore_eos=True), put)
        while not ticket.ended:
            threading.Event().wait(0.001)
        assert isinstance(ticket.error, OSError)


def test_events_outlive_whoever_was_interrupted(alone):
    """Ctrl-C in one caller's step: the other's tokens of that step are not lost."""
    llm = llm_of()

    def interrupt():
        raise KeyboardInterrupt

    made = []
    llm.submit(*NEIGHBOUR, made.append)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([(2, 3)], SamplingParams(30, ignore_eos=True), interrupt)
    while llm.scheduler.busy:
        llm._loop.step()
    assert tuple(event.token for event in made) == alone


def test_a_failing_sampler_ends_its_own_request_and_its_await_returns(alone, monkeypatch):
    from deepseek_trt.engines.generation import sampling

    real = sampling.pick_rows

    def pick(rows, logits):
        if any(row.top_k == 5 and row.made == 3 for row in rows):
            for row in rows:
                row.draws += 1  # as one that fails halfway
            raise ArithmeticError("cannot be sampled")
        return real(rows, logits)

    monkeypatch.setattr(sampling, "pick_rows", pick)
    params = SamplingParams(30, ignore_eos=True, temperature=1.0, top_k=5)
    with llm_of() as llm, neighbour(llm, alone), pytest.raises(ArithmeticError, match="cannot be sampled"):
        asyncio.run(asyncio.wait_for(llm.agenerate([(2, 3)], params), 20))


def test_stop_strings_cost_what_they_have_begun():
    """128 stops of 1,024 characters, each begun by most of the text: found where a plain search finds them."""
    stops = ["a" * (900 + i) + "b" for i in range(123)]
    text = StopText(stops)
    shown = "".join(text.push("a" * 10) for _ in range(200))
    assert not text.found
    shown += text.push("cb" + "a" * 901 + "b tail")
    assert text.found
    assert shown == "a" * 2000 + "cb"  # of several that are complete at the same character the longest


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_are_found_as_by_a_plain_search(seed):
    rng = np.random.default_rng(seed)
    stops = ["".join(rng.choice(list("ab"), rng.integers(1, 7))) for _ in range(4)]
    text = "".join(rng.choice(list("abc"), 60))
    found = min(((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=None)
    stream, shown, at = StopText(stops), "", 0
    while at < len(text):
        size = int(rng.integers(1, 6))
        shown += stream.push(text[at : at + size])
        at += size
    shown += "" if stream.found else stream.flush()
    assert stream.found == (found is not None)
    assert shown == (text[: found[1]] if found else text)


# Requests to the service

HI = '[{"role": "user", "content": "abc"}]'
SERVED = {
    "a long prompt": {"text_input": "a" * 50_000_000},
    "long messages": {"messages": "[" + "1," * 10_000_000 + "1]"},
    "long tools": {"messages": HI, "tools": "[" + " " * 10_000_000 + "]"},
    "deep messages": {"messages": "[" * 1500 + "]" * 1500},
    "deep content": {"messages": '[{"role": "user", "content": "a", "x": ' + "[" * 900 + "]" * 900 + "}]"},
    "very deep content": {"messages": '{"a":' * 1000 + "1" + "}" * 1000},
    "deep arguments": {"messages": HI, "chat_template_kwargs": '{"a": ' + "[" * 990 + "]" * 990 + "}"},
    "6,000 digits": {"messages": '[{"role": "user", "content": "a", "x": ' + "9" * 1900 * 2 + "}]" + "9" * 200},
    "many digits": {"messages": HI, "chat_template_kwargs": '{"x": ' + "9" * 3990 + "e" + "9" * 5 + "}"},
    "infinity": {"messages": '[{"role": "user", "content": "a", "x": 1e999}]'},
    "NaN": {"messages": '[{"role": "user", "content": "a", "x": NaN}]'},
    "a key twice": {"messages": '[{"role": "user", "content": "a", "content": "b"}]'},
    "half a character": {"messages": r'[{"role": "user", "content": "\ud800"}]'},
    "half a character in a key": {"messages": r'[{"role": "user", "content": "a", "\ud800": 1}]'},
    "half a role": {"messages": r'[{"role": "\udfff", "content": "a"}]'},
    "bytes": {"text_input": b"\xff\xfe\x00"},
    "many stops": {"text_input": "abc", "stop_words": ["a"] * 200_000},
    "long stops": {"text_input": "abc", "stop_words": ["a" * 100_000] * 10},
    "many stop tokens": {"text_input": "abc", "stop_token_ids": [99] * 1_000_000},
    "bad words": {"text_input": "abc", "bad_words": ["b" * 1000] * 1000},
    "a null message": {"messages": "[null]"},
    "a number": {"messages": "3"},
    "names": {"messages": HI, "chat_template_kwargs": '{"messages": []}'},
}
TYPES = {
    "max_tokens": np.float32([[4]]),
    "temperature": np.int32([[1]]),
    "text_input": np.int64([[1, 2]]),
    "messages": np.zeros((1, 1)),
    "stream": np.array([["yes"]], dtype=object),
    "seed": np.float64([[1]]),
    "stop_words": np.int32([[1]]),
    "unknown": np.int32([[1]]),
    "top_k": np.zeros((0, 1), np.int32),
    "min_p": np.zeros((4096, 4096), np.float32),
}


@pytest.fixture
def service():
    one = served.Served()
    yield one
    one.service.close()


@pytest.fixture
def quiet(caplog):
    """Nothing is logged as a bug."""
    with caplog.at_level(logging.WARNING, "deepseek_trt"):
        yield
    assert not caplog.records


def beside(service, *asked):
    """Channels of what is asked, made while a neighbour is being answered; the neighbour's text."""
    first = service.ask(text_input="abc", max_tokens=12).text
    service.session.gate.clear()
    channel = service.ask(text_input="abc", max_tokens=12)
    channels = [each() for each in asked]
    service.session.gate.set()
    assert channel.text == first
    return channels


@pytest.mark.parametrize("name", SERVED)
def test_a_bad_request_gets_an_error_and_its_neighbour_an_answer(service, quiet, name):
    (channel,) = beside(service, lambda: service.ask(**SERVED[name]))
    (failure,) = channel.answer()
    assert isinstance(failure, Failure)
    assert failure.kind == "invalid"
    assert len(failure.message) <= 1000


@pytest.mark.parametrize("name", TYPES)
def test_a_tensor_of_another_type_is_an_error(service, quiet, name):
    def ask():
        channel = served.Channel()
        good = {} if name == "messages" else served.tensors(text_input="abc")
        service.service.accept(channel, {**good, name: TYPES[name]})
        return channel

    (channel,) = beside(service, ask)
    (failure,) = channel.answer()
    assert failure.kind == "invalid"
    assert name in failure.message


def test_parameters_without_end(service, quiet):
    channel = served.Channel()
    service.service.accept(channel, served.tensors(text_input="abc"), {"x" * i: 1 for i in range(1, 2000)})
    (failure,) = channel.answer()
    assert failure.kind == "invalid"
    assert len(failure.message) <= 1000


def test_a_request_that_is_read_for_long_holds_up_no_other(quiet):
    """One reader waits in a template; others are read, refused when there are too many, and close waits for it."""
    one, waits = served.Served(max_inflight=3), threading.Event()
    reading = threading.Event()

    def encode_chat(messages, /, tools=None, **arguments):
        reading.set()
        assert waits.wait(20)
        return [1, 2]

    one.service._text.encode_chat = encode_chat
    slow = one.ask(messages=HI, max_tokens=3)
    assert reading.wait(20)
    assert one.ask(text_input="abc", max_tokens=5).text
    one.session.gate.clear()
    running = [one.ask(text_input="abc", max_tokens=5) for _ in range(2)]
    (refused,) = one.ask(text_input="abc").answer()
    assert (refused.kind, "3 requests are in flight" in refused.message) == ("refused", True)
    one.session.gate.set()
    assert all(channel.text for channel in running)
    closing = threading.Thread(target=one.service.close)
    closing.start()
    assert one.ask(text_input="a").answer()[0].kind == "refused"
    waits.set()
    closing.join(20)
    assert not closing.is_alive()
    assert slow.answer()[-1].kind == "refused"


def test_close_comes_to_an_end_for_requests_of_any_kind():
    one = served.Served(drain_seconds=0.5)
    channels = [one.ask(**SERVED[name]) for name in ("deep messages", "infinity", "names")]
    one.service.close()
    assert all(len(channel.answer()) == 1 for channel in channels)
