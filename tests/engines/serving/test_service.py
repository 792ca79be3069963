"""The service behind the server: requests read, answers streamed, each with exactly one final response."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.generation.answer import Answer
from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving import metrics as m
from deepseek_trt.engines.serving.request import GenerateRequest, parse_request
from deepseek_trt.engines.serving.service import Service
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.serving.stream import Failure, Response
from deepseek_trt.engines.text.stream import Part
from deepseek_trt.export.errors import RequestError

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

WAIT = 20.0  # seconds before a test that waits gives up
LETTERS = "abcdefghijklm"


class Letters:
    """A tokenizer of 13 letters."""

    most_bytes = 4000

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    encode_prompt = encode

    def decode(self, ids):
        return "".join(LETTERS[token] for token in ids)

    def encode_chat(self, messages, /, tools=None, **arguments):
        said = [*messages, *(tools or ()), arguments]
        return self.encode("".join(one.get("content", "") for one in said))

    def stream(self):
        return self

    def step(self, token):
        return Part(LETTERS[token])

    def flush(self):
        return ""


class GatedSession(fake.FakeSession):
    """Computes while the gate is open."""

    def __init__(self, pages):
        super().__init__(pages)
        self.gate = threading.Event()
        self.gate.set()

    def _rows(self, *arguments):
        assert self.gate.wait(WAIT)
        return super()._rows(*arguments)


class Channel:
    """Keeps what is sent; `gone` is a client that went away, `broken` one that nothing can be sent to."""

    def __init__(self):
        self.sent, self.finals, self.gone, self.broken = [], 0, False, False
        self.done = threading.Event()

    def send(self, response, final):
        assert not self.finals, "sent after the final response"
        if self.broken and response is not None:
            raise OSError("no memory")
        self.sent.append(response)
        if final:
            self.finals += 1
            self.done.set()

    def is_cancelled(self):
        return self.gone

    def answer(self):
        assert self.done.wait(WAIT), "no final response"
        assert self.finals == 1
        return self.sent

    @property
    def text(self):
        return "".join(response.text for response in self.answer())


class Board:
    """Metrics as plain numbers and lists."""

    def __init__(self):
        self.values = {}

    def show(self, metric, value, label=""):
        if metric.kind == "counter":
            self.values[metric.name, label] = self.values.get((metric.name, label), 0) + value
        elif metric.kind == "gauge":
            self.values[metric.name, label] = value
        else:
            self.values.setdefault((metric.name, label), []).append(value)


class Host:
    def __init__(self):
        self.wants, self.reasons = True, []

    def wants_model(self):
        return self.wants

    def engine_failed(self, reason):
        self.reasons.append(reason)

    def flush(self):
        pass


class Served:
    """A service over the fake session, and all around it."""

    def __init__(self, drain_seconds=WAIT, max_inflight=4):
        self.session, self.board, self.host = GatedSession(40), Board(), Host()
        self.llm = LLM(self.session, fake.Config, Letters(), SchedulerLimits(3, 16, 8))
        self.service = Service(self.llm, max_inflight, drain_seconds, m.Metrics(self.board), self.host)

    def ask(self, **inputs):
        channel = Channel()
        self.service.accept(channel, tensors(**inputs))
        return channel


@pytest.fixture
def served():
    served = Served()
    yield served
    served.session.gate.set()
    served.service.close()
    assert not served.service._live
    assert served.llm.scheduler.pool.free == served.session.pages - 1
    assert not [t for t in threading.enumerate() if t.name.startswith("deepseek-trt")]


TYPES = {bool: np.bool_, int: np.int32, float: np.float32}


def tensors(**inputs):
    """As tritonserver gives them: [1, n], text as bytes."""
    arrays = {}
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], (str, bytes)):
            data = [v.encode() if isinstance(v, str) else v for v in values]
            arrays[name] = np.array([data], dtype=np.object_)
        else:
            arrays[name] = np.array([values], dtype=np.uint64 if name == "seed" else TYPES[type(values[0])])
    return arrays


def wait_until(holds):
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


HI = '[{"role": "user", "content": "a"}]'
LONG = {"text_input": "abc", "max_tokens": 30, "min_tokens": 30}


def test_whole_and_streamed_answers_are_generates(served):
    params = SamplingParams(12, min_tokens=12)
    alone = LLM(GatedSession(40), fake.Config, Letters())
    want = dict(zip(("abc", "h"), alone.generate(["abc", "h"], params), strict=True))
    asked = [
        (prompt, stream, served.ask(text_input=prompt, max_tokens=12, min_tokens=12, stream=stream))
        for prompt in want
        for stream in (False, True)
    ]
    for prompt, stream, channel in asked:
        assert channel.text == want[prompt].text
        assert sum(response.num_output_tokens for response in channel.sent) == 12
        assert {response.num_input_tokens for response in channel.sent} == {len(prompt)}
        reasons = [response.finish_reason for response in channel.sent]
        assert reasons == [""] * (len(reasons) - 1) + ["length"]
        assert stream or len(reasons) == 1


def test_pieces_that_wait_are_sent_as_one(served):
    """A slow client gets fewer, longer pieces."""
    channel = served.ask(**LONG, stream=True)
    channel.answer()
    assert 1 <= len(channel.sent) <= 30


def test_echo_logprobs_and_chat(served):
    plain = served.ask(text_input="abc", max_tokens=5, min_tokens=5).text
    messages = json.dumps([{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}])
    channel = served.ask(
        messages=messages, max_tokens=5, min_tokens=5, exclude_input_in_output=False, return_log_probs=True, stream=True
    )
    assert channel.text == "abc" + plain
    logprobs = [value for response in channel.sent for value in response.logprobs]
    assert len(logprobs) == 5
    assert channel.sent[-1].cum_logprob == pytest.approx(sum(logprobs))


def test_tools_and_template_arguments_reach_the_template(served):
    more = {"tools": '[{"content": "b"}]', "chat_template_kwargs": '{"self": 1, "content": "c"}'}
    echo = served.ask(messages=HI, **more, max_tokens=1, exclude_input_in_output=False).text
    assert echo[:-1] == "abc"


def test_stop_words_end_an_answer(served):
    whole = served.ask(**LONG).text
    channel = served.ask(text_input="abc", max_tokens=30, stop_words=[whole[6:8], ""])
    at = whole.index(whole[6:8])
    assert (channel.text, channel.sent[-1].finish_reason) == (whole[:at], "stop")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "either text_input or messages"),
        ({"text_input": "a", "messages": "[]"}, "either text_input or messages"),
        ({"text_input": ""}, "empty"),
        ({"text_input": "a" * 50}, "50 tokens"),
        ({"text_input": b"\xff"}, "UTF-8"),
        ({"text_input": ["a", "b"]}, r"shape \[1, 2\]"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens 0"),
        ({"text_input": "a", "max_tokens": -3}, "max_tokens -3"),
        ({"text_input": "a", "temperature": -1.0}, "temperature"),
        ({"text_input": "a", "temperature": float("nan")}, "temperature"),
        ({"text_input": "a", "temperature": float("inf")}, "temperature"),
        ({"text_input": "a", "top_p": 0.0}, "top_p"),
        ({"text_input": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"text_input": "a", "bad_words": ["x"]}, "bad_words"),
        ({"text_input": "a", "timeout_ms": 0}, "timeout_ms 0"),
        ({"text_input": "a", "stop_words": [b"\xff"]}, "stop_words is not UTF-8"),
        ({"messages": "{"}, "not JSON"),
        ({"messages": "[]"}, "at least one"),
        ({"messages": '[{"role": "user"}]'}, "content"),
        ({"messages": '["hello"]'}, "content"),
        ({"messages": "[" * 9999}, "not JSON"),
        ({"messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'}, "image_url"),
        ({"messages": HI, "tools": "no"}, "tools is not JSON"),
        ({"messages": HI, "tools": "{}"}, "list of objects"),
        ({"messages": HI, "chat_template_kwargs": "[1]"}, "give an object"),
        ({"messages": HI, "chat_template_kwargs": '{"chat_template": "/etc/passwd"}'}, "not one that can be set"),
        ({"text_input": "a", "tools": "[]"}, "tools is for the chat template"),
        ({"text_input": "a", "chat_template_kwargs": "{}"}, "chat_template_kwargs is for the chat template"),
    ],
)
def test_what_is_wrong_is_said(served, inputs, words):
    (failure,) = served.ask(**inputs).answer()
    assert failure.kind == "invalid"
    assert re.search(words, failure.message)
    assert not served.service._live


def test_unknown_parameters_are_named_and_the_servers_own_are_not():
    own = {"triton_enable_empty_final_response": True, "id": "7", "binary_data_output": True}
    assert parse_request(tensors(text_input="a"), own, Letters()).prompt_ids == [0]
    with pytest.raises(RequestError, match="parameter bar, foo: not known"):
        parse_request(tensors(text_input="a"), {**own, "foo": 1, "bar": 2}, Letters())


def test_numbers_are_what_the_client_wrote():
    """0.7 as float32 is 0.699999988: sampling must get what the command line gets."""
    params = parse_request(tensors(text_input="a", temperature=0.7, top_p=0.1, seed=2**64 - 1), {}, Letters()).params
    assert (params.temperature, params.top_p, params.seed) == (0.7, 0.1, 2**64 - 1)
    seeds = {parse_request(tensors(text_input="a"), {}, Letters()).params.seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize(("given", "servers", "used"), [(None, 0, None), (70, 0, 70), (None, 1500, 2), (70, 5000, 5)])
def test_the_shorter_time_out_counts(given, servers, used):
    inputs = {} if given is None else {"timeout_ms": given}
    assert parse_request(tensors(text_input="a", **inputs), {}, Letters(), servers).timeout_ms == used


def test_full_is_refused_and_then_taken(served):
    served.session.gate.clear()
    running = [served.ask(**LONG) for _ in range(4)]
    (failure,) = served.ask(text_input="a").answer()
    assert (failure.kind, "4 requests are in flight" in failure.message, failure.full) == ("refused", True, True)
    served.session.gate.set()
    assert all(len(channel.text) == 30 for channel in running)
    assert served.ask(text_input="a", max_tokens=3, min_tokens=3).text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_went_away_frees_its_pages(served, stream):
    served.session.gate.clear()
    leaving, staying = served.ask(**LONG, stream=stream), served.ask(**LONG, stream=stream)
    leaving.gone = True
    assert leaving.answer()[-1].kind == "cancelled"
    served.session.gate.set()
    assert len(staying.text) == 30
    wait_until(lambda: not served.llm.scheduler.busy)


def test_a_deadline_ends_an_answer(served):
    served.session.gate.clear()
    (failure,) = served.ask(**LONG, timeout_ms=1).answer()
    assert failure == Failure("timeout", "timeout_ms 1: passed after 0 tokens")


def test_what_cannot_be_sent_ends_the_request(served):
    channel = Channel()
    channel.broken = True
    served.service.accept(channel, tensors(**LONG, stream=True))
    assert channel.answer() == [None]
    assert len(served.ask(**LONG).text) == 30


def test_a_failed_engine_fails_all_and_the_host_is_told(served):
    served.session.gate.clear()
    running = [served.ask(**LONG, stream=i == 0) for i in range(3)]
    wait_until(lambda: len(served.service._live) == 3)  # one that is read later would be refused
    served.session.failures = 1
    served.session.gate.set()
    for channel in running:
        assert channel.answer()[-1].kind == "failed"
        assert "the device is gone" in channel.sent[-1].message
    wait_until(lambda: served.host.reasons)
    (failure,) = served.ask(text_input="a").answer()
    assert (failure.kind, failure.message) == ("refused", served.host.reasons[0])


def test_logits_that_are_not_finite_are_that_requests_error_alone(served, monkeypatch):
    real = served.session._row

    def row(ids, past, table):
        is_bad = served.session._values(1, table)[0] == fake.value_after(0, 9, 0) if past else ids[0] == 9
        return [logits * (np.nan if is_bad else 1) for logits in real(ids, past, table)]

    monkeypatch.setattr(served.session, "_row", row)
    bad, good = served.ask(text_input="jb", max_tokens=5), served.ask(text_input="bc", max_tokens=5)
    failure = bad.answer()[-1]
    assert isinstance(failure, Failure)
    assert failure.kind == "failed"
    assert "after 0 tokens: the model's logits are not finite at token 1 of the answer" in failure.message
    assert not any(isinstance(response, Failure) for response in good.answer())
    assert not served.host.reasons  # the model stays loaded
    assert served.ask(text_input="bc", max_tokens=5).text == good.text


def test_an_unwanted_model_takes_nothing_and_ends_what_runs(served):
    served.session.gate.clear()
    channel = served.ask(**LONG)
    served.host.wants = False
    wait_until(lambda: served.service._closed)
    (failure,) = served.ask(text_input="a").answer()
    assert (failure.kind, failure.full) == ("refused", False)
    served.session.gate.set()
    assert len(channel.text) == 30


def test_close_ends_with_an_error_what_takes_too_long():
    served = Served(drain_seconds=0.05)
    served.session.gate.clear()
    channels = [served.ask(**LONG, stream=stream) for stream in (True, False)]
    wait_until(lambda: len(served.service._live) == 2)
    opener = threading.Timer(0.3, served.session.gate.set)
    opener.start()
    served.service.close()
    assert [channel.answer()[-1].kind for channel in channels] == ["failed", "failed"]
    assert "unloaded" in channels[0].sent[-1].message
    opener.join()


def test_metrics_add_up(served):
    for _ in range(3):
        served.ask(**LONG).answer()
    served.ask(text_input="").answer()
    served.service.close()
    values = served.board.values
    assert values[m.REQUESTS.name, "ok"] == 3
    assert values[m.REQUESTS.name, "invalid"] == 1
    assert (values[m.INPUT_TOKENS.name, ""], values[m.OUTPUT_TOKENS.name, ""]) == (9, 90)
    assert len(values[m.FIRST_TOKEN.name, ""]) == len(values[m.EACH_TOKEN.name, ""]) == 3
    assert values[m.PAGES_USED.name, ""] == values[m.BATCH_SIZE.name, ""] == values[m.INFLIGHT.name, ""] == 0
    assert values[m.PAGES_FREE.name, ""] == 39


def test_many_at_once_end_once_each(served):
    served.service._max_inflight = 60
    channels = [served.ask(text_input="abc"[: 1 + i % 3], max_tokens=5, stream=i % 2 == 0) for i in range(60)]
    for i in range(0, 60, 7):
        channels[i].gone = True
    kinds = [channel.answer()[-1] for channel in channels]
    assert all(isinstance(last, Response) or last.kind == "cancelled" for last in kinds)


SETTINGS = ServingSettings("ort", 64, 32, 2048, 1025, 512, 1024, 1, False, 700)


def test_settings_come_back_from_a_config():
    assert ServingSettings.from_parameters({**SETTINGS.to_parameters(), "dtype": "bfloat16"}) == SETTINGS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pages": None}, "pages is missing"),
        ({"pages": "many"}, "pages 'many'"),
        ({"pages": "1"}, "at least 2"),
        ({"prefix_reuse": "yes"}, "true or false"),
        ({"max_inflight": "0"}, "max_inflight 0"),
        ({"drain_ms": "-1"}, "drain_ms -1"),
    ],
)
def test_edited_settings_are_checked(change, words):
    parameters = {**SETTINGS.to_parameters(), **change}
    with pytest.raises(RequestError, match=words):
        ServingSettings.from_parameters({k: v for k, v in parameters.items() if v is not None})


@pytest.mark.parametrize(("used", "result"), [(3, "ok"), (None, "cancelled")])
def test_an_answer_of_tokens_alone_ends_where_it_is_left(served, monkeypatch, used, result):
    """What a server in another process does: it finds stop strings, or its client goes."""
    steps, left, decode = [], threading.Event(), served.session.decode

    def step(*arguments):
        steps.append(1)
        assert len(steps) < 6 or left.wait(WAIT)
        return decode(*arguments)

    monkeypatch.setattr(served.session, "decode", step)
    params = SamplingParams(30, min_tokens=30)
    request = GenerateRequest([0, 1, 2], params, True, "", None, tokens_alone=True)
    channel = Channel()
    stream = served.service.take(channel, lambda: (request, Answer(None, params)))
    wait_until(lambda: sum(len(response.pieces) for response in channel.sent) >= 3)
    served.service.leave(stream, used)
    left.set()
    last = channel.answer()[-1]
    assert (last.finish_reason if used else last.kind) == ("stop" if used else "cancelled")
    wait_until(lambda: served.llm.scheduler.pool.free == served.session.pages - 1)
    wait_until(lambda: served.board.values.get((m.REQUESTS.name, result)) == 1)
    assert not used or served.board.values[m.OUTPUT_TOKENS.name, ""] == used
