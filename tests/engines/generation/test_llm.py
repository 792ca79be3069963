"""LLM: answers as text, streamed, in threads and in tasks; and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import importlib.util
import threading
from pathlib import Path

import pytest

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.llm import LLM
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.text.stream import Part
from deepseek_trt.export.errors import BackendError, RequestError

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)

PARAMS = SamplingParams(8, ignore_eos=True)
PROMPTS = [(3, 4, 5), (7,), (2, 2, 9, 4, 5, 6)]


class Letters:
    """A tokenizer of 13 letters."""

    def encode(self, text):
        return ["abcdefghijklm".index(letter) for letter in text]

    def stream(self):
        return self

    def step(self, token):
        return Part("abcdefghijklm"[token])

    def flush(self):
        return ""


@pytest.fixture
def llm():
    with LLM(fake.FakeSession(20), fake.Config, Letters(), SchedulerLimits(3, 16, 8)) as llm:
        yield llm
        assert_idle(llm)
    assert not [t for t in threading.enumerate() if t.name == "deepseek-trt-engine"]


def assert_idle(llm):
    llm._loop.settle()
    assert not llm.scheduler.busy
    assert llm.scheduler.pool.free == llm.session.pages - 1


def test_generate_stream_and_their_async_forms_agree(llm):
    results = llm.generate(PROMPTS, PARAMS)
    assert [len(r.token_ids) for r in results] == [8, 8, 8]
    assert [r.prompt_ids for r in results] == PROMPTS
    assert all(r.finish_reason == "length" and r.logprobs is None for r in results)
    for prompt, result in zip(PROMPTS, results, strict=True):
        pieces = list(llm.stream(prompt, PARAMS))
        assert tuple(p.token_id for p in pieces) == result.token_ids
        assert "".join(p.text for p in pieces) == result.text
        assert [p.finish_reason for p in pieces] == [None] * 7 + ["length"]
    assert asyncio.run(llm.agenerate(PROMPTS, PARAMS)) == results

    async def streamed():
        return "".join([piece.text async for piece in llm.astream(PROMPTS[0], PARAMS)])

    assert asyncio.run(streamed()) == results[0].text


def test_text_prompts_are_encoded(llm):
    assert llm.generate(["def"], PARAMS)[0].token_ids == llm.generate([(3, 4, 5)], PARAMS)[0].token_ids


def test_stop_string_over_token_borders_ends_at_once(llm):
    whole = llm.generate([PROMPTS[0]], PARAMS)[0]
    stop = whole.text[3:5]
    at = whole.text.index(stop)
    params = dataclasses.replace(PARAMS, stop=(stop,))
    result = llm.generate([PROMPTS[0]], params)[0]
    assert (result.text, result.finish_reason) == (whole.text[:at], "stop")
    assert len(result.token_ids) == at + 2
    assert "".join(p.text for p in llm.stream(PROMPTS[0], params)) == result.text
    late = llm.generate([PROMPTS[0]], dataclasses.replace(params, min_tokens=8))[0]
    assert late.text.startswith(whole.text[:7])


def test_stop_token_has_no_text(llm):
    whole = llm.generate([PROMPTS[0]], PARAMS)[0]
    stop = whole.token_ids[3]
    at = whole.token_ids.index(stop)
    result = llm.generate([PROMPTS[0]], dataclasses.replace(PARAMS, stop_token_ids=(stop,)))[0]
    assert (result.token_ids, result.text) == (whole.token_ids[: at + 1], whole.text[:at])
    assert result.finish_reason == "stop"


def test_logprobs(llm):
    result = llm.generate([PROMPTS[0]], dataclasses.replace(PARAMS, logprobs=2))[0]
    assert len(result.logprobs) == len(result.top_logprobs) == 8
    assert all(top[0] == (token, logprob) for token, logprob, top in
               zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True))  # fmt: skip


def test_one_seed_for_all_is_a_seed_a_prompt(llm):
    params = dataclasses.replace(PARAMS, temperature=9.0, seed=4)
    same = llm.generate([PROMPTS[0]] * 3, params)
    assert len({r.token_ids for r in same}) > 1
    each = [dataclasses.replace(params, seed=4 + i) for i in range(3)]
    assert llm.generate([PROMPTS[0]] * 3, each) == same
    assert llm.generate([PROMPTS[0]], each[2:])[0] == same[2]


def test_leaving_a_stream_frees_its_pages(llm):
    stream = llm.stream(PROMPTS[0], PARAMS)
    next(stream)
    assert llm.scheduler.pool.free < 19
    stream.close()
    assert llm.scheduler.pool.free == 19
    assert not llm.scheduler.busy


def test_streams_side_by_side(llm):
    expected = [r.text for r in llm.generate(PROMPTS, PARAMS)]
    streams = [llm.stream(p, PARAMS) for p in PROMPTS]
    assert ["".join(texts) for texts in zip(*[[p.text for p in s] for s in streams], strict=True)]
    streams = [llm.stream(p, PARAMS) for p in PROMPTS]
    texts = ["", "", ""]
    for _ in range(8):
        for row, stream in enumerate(streams):
            texts[row] += next(stream).text
    assert texts == expected
    for stream in streams:
        assert next(stream, None) is None


def test_threads_and_tasks_share_one_batch(llm):
    expected = llm.generate(PROMPTS, PARAMS)
    made = {}

    def ask(index):
        made[index] = llm.generate(PROMPTS, PARAMS)

    async def ask_async():
        return await asyncio.gather(*(llm.agenerate(PROMPTS, PARAMS) for _ in range(3)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert asyncio.run(ask_async()) == [expected] * 3
    for thread in threads:
        thread.join()
    assert list(made.values()) == [expected] * 3


def test_cancelled_task_frees_its_pages(llm):
    async def cancel():
        started = asyncio.Event()

        async def read():
            async for _ in llm.astream(PROMPTS[0], dataclasses.replace(PARAMS, max_new_tokens=30)):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


def test_leaving_an_async_stream(llm):
    async def leave():
        async with contextlib.aclosing(llm.astream(PROMPTS[0], PARAMS)) as stream:
            async for _ in stream:
                break

    asyncio.run(leave())


def test_an_error_of_the_session_reaches_who_waits(llm):
    llm.session.failures = 1
    with pytest.raises(OSError, match="gone"):
        llm.generate(PROMPTS, PARAMS)
    assert_idle(llm)
    llm.session.failures = 1
    with pytest.raises(OSError, match="gone"):
        asyncio.run(llm.agenerate(PROMPTS[:1], PARAMS))
    assert len(llm.generate(PROMPTS, PARAMS)) == 3


def test_a_tokenizer_error_is_one_requests_alone(llm, monkeypatch):
    expected = llm.generate(PROMPTS[1:2], PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(Letters, "step", lambda self, token: {}[token])
        stream = llm.stream(PROMPTS[0], PARAMS)
        with pytest.raises(KeyError):
            next(stream)
    assert llm.generate(PROMPTS[1:2], PARAMS) == expected


def test_closing_ends_requests_and_refuses_new_ones():
    llm = LLM(fake.FakeSession(20), fake.Config)
    stream = llm.stream(PROMPTS[0], PARAMS)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(BackendError, match="was closed before the request ended"):
        list(stream)
    with pytest.raises(BackendError, match="open another"):
        llm.generate(PROMPTS, PARAMS)
    with pytest.raises(BackendError, match="open another"):
        asyncio.run(llm.agenerate(PROMPTS, PARAMS))
    assert_idle(llm)


def test_an_llm_that_is_dropped_ends_its_thread():
    llm = LLM(fake.FakeSession(20), fake.Config)
    asyncio.run(llm.agenerate(PROMPTS, PARAMS))
    assert [t for t in threading.enumerate() if t.name == "deepseek-trt-engine"]
    del llm
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "deepseek-trt-engine"]


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ("abc", None, "give a list"),
        ([(3,), ()], None, "prompt 1 is empty"),
        ([(3,)], [PARAMS, PARAMS], "2 SamplingParams for 1 prompts"),
        ([(3,)], SamplingParams(stop_token_ids=(50,)), "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(llm, prompts, params, words):
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params)
    with pytest.raises(RequestError, match=words):
        asyncio.run(llm.agenerate(prompts, params))
    assert not llm.session.calls


def test_text_needs_a_tokenizer():
    with LLM(fake.FakeSession(20), fake.Config) as llm:
        assert llm.generate([(3,)], PARAMS)[0].text is None
        with pytest.raises(RequestError, match="give token ids"):
            llm.generate(["abc"], PARAMS)
        with pytest.raises(RequestError, match="use stop_token_ids"):
            llm.generate([(3,)], SamplingParams(stop=("a",)))


def test_unknown_backend_names_those_there_are(tmp_path):
    with pytest.raises(RequestError, match="auto, ort, ort-cuda, torch, tensorrt"):
        LLM.open(tmp_path, backend="magic")


def test_demo_model(demo_checkpoint, bundle_of):
    """The real tokenizer and session: text, stop string, and the same answer streamed by a task."""
    bundle = bundle_of(demo_checkpoint, page_size=8)
    with pytest.raises(RequestError, match="cache_mib 0"):
        LLM.open(bundle.path, cache_mib=0)
    with LLM.open(bundle.path, threads=1, cache_mib=8) as llm:
        first, second = llm.generate(["Return the name of", "The number of"], SamplingParams(12))
        assert first.text == llm.text.decode(first.token_ids)
        stop = second.text[4:9]
        params = SamplingParams(12, stop=(stop,))
        assert llm.generate(["The number of"], params)[0].text == second.text[: second.text.index(stop)]

        async def read():
            return "".join([piece.text async for piece in llm.astream("Return the name of", SamplingParams(12))])

        assert asyncio.run(read()) == first.text
    with pytest.raises(RequestError, match="speculate 'often': must be one of off, lookup, mtp, auto"):
        LLM.open(bundle.path, speculate="often")
    with LLM.open(bundle.path, threads=1, cache_mib=8, speculate="lookup") as llm:
        again = llm.generate(["Return the name of", "The number of"], SamplingParams(12))
        assert [result.token_ids for result in again] == [first.token_ids, second.token_ids]


@pytest.mark.parametrize("prompts", ["abc", 5, None, [5], [None], [[1.5]], [["a"]]])
def test_prompts_of_the_wrong_type_are_named(llm, prompts):
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, PARAMS)


@pytest.mark.parametrize("params", [5, "greedy", [5], {"max_tokens": 3}])
def test_params_of_the_wrong_type_are_named(llm, params):
    with pytest.raises(RequestError, match="SamplingParams"):
        llm.generate([(3,)], params)


def test_names_that_others_use(llm):
    assert (
        SamplingParams(max_tokens=5)
        == SamplingParams(5)
        == dataclasses.replace(PARAMS, max_new_tokens=5, seed=0, ignore_eos=False)
    )
    assert SamplingParams(stop="ab").stop == ("ab",)
    with pytest.raises(RequestError, match="leave out one of them"):
        SamplingParams(7, max_tokens=5)
    with pytest.raises(RequestError, match="max_new_tokens 0"):
        SamplingParams(max_tokens=0)
    assert repr(llm).startswith("LLM(")


def test_chat_is_the_template_and_generate(llm, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Letters, "encode_chat", lambda self, messages, tools=None, **own: seen.append((tools, own)) or [3, 4], False
    )
    messages = [{"role": "user", "content": "a"}]
    assert llm.chat(messages, PARAMS, tools=[], thinking=True) == llm.generate([(3, 4)], PARAMS)[0]
    assert seen == [([], {"thinking": True})]
    with LLM(fake.FakeSession(20), fake.Config) as silent, pytest.raises(RequestError, match=r"no tokenizer\.json"):
        silent.chat(messages)
