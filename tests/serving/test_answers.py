"""Answers over HTTP are LLM.generate's, whole and streamed, by every client."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from deepseek_trt import LLM, SamplingParams

PROMPTS = ("Return the number of", "def add(a, b):\n", "Größe über 5 – ")
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 24}


@pytest.fixture(scope="module")
def llm(demo):
    with LLM.open(demo) as llm:
        yield llm


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


def streamed(events):
    """The text, finish reason and usage of a streamed completion."""
    text, finish, usage = "", None, None
    for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            text += choice.text
            finish = choice.finish_reason or finish
    return text, finish, usage


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions_are_generates_whole_and_streamed(llm, client, prompt):
    (want,) = llm.generate([prompt], SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_new_tokens=24))
    whole = client.completions.create(model="demo", prompt=prompt, **SAMPLED)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (want.text, want.finish_reason)
    counts = (len(want.prompt_ids), len(want.token_ids))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == counts
    assert whole.usage.total_tokens == sum(counts)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text, finish, usage = streamed(client.completions.create(model="demo", prompt=prompt, **SAMPLED, **options))
    assert (text, finish, usage) == (want.text, want.finish_reason, whole.usage)


def test_a_stop_string_ends_text_and_usage_where_generate_ends_them(llm, client):
    (free,) = llm.generate([PROMPTS[0]], SamplingParams(max_new_tokens=40))
    stop = free.text[11:14]
    (want,) = llm.generate([PROMPTS[0]], SamplingParams(max_new_tokens=40, stop=stop))
    asked = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0, "stop": stop}
    whole = client.completions.create(**asked)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (want.text, "stop")
    assert whole.usage.completion_tokens == len(want.token_ids)
    text, finish, usage = streamed(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert (text, finish, usage) == (want.text, "stop", whole.usage)


def test_chat_is_the_templates_prompt_and_has_one_bos(llm, client):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Say hi"}]
    rendered = llm.text.chat.render([{"role": "system", "content": "Be brief."}, messages[1]])
    want = llm.chat([{"role": "system", "content": "Be brief."}, messages[1]], SamplingParams(12))
    answer = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=12, temperature=0)
    assert answer.choices[0].message.content == want.text
    assert answer.usage.prompt_tokens == len(want.prompt_ids)
    assert want.prompt_ids.count(0) == 1
    assert rendered.startswith("<｜begin▁of▁sentence｜>")
    text = client.completions.create(model="demo", prompt=rendered, max_tokens=12, temperature=0)
    assert text.choices[0].text == want.text
    assert text.usage.prompt_tokens == len(want.prompt_ids)
    events = list(
        client.chat.completions.create(
            model="demo", messages=messages, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == want.text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == answer.choices[0].finish_reason
    assert events[-1].usage == answer.usage


def test_a_chat_without_bounds_ends_with_the_models_length(client, llm):
    limit = llm.session.cache and 2048
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Say"}], temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == limit


def test_several_prompts_and_choices_sample_with_seeds_of_their_own(llm, client):
    params = [SamplingParams(10, temperature=0.9, seed=5 + index) for index in range(4)]
    want = [result.text for result in llm.generate([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, params)]
    answer = client.completions.create(model="demo", prompt=[*PROMPTS[:2]], n=2, temperature=0.9, seed=5, max_tokens=10)
    assert [choice.text for choice in answer.choices] == want
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(len(llm.text.encode(prompt)) for prompt in PROMPTS[:2])
    texts = [""] * 4
    options = {"temperature": 0.9, "seed": 5, "max_tokens": 10, "stream": True}
    for event in client.completions.create(model="demo", prompt=[*PROMPTS[:2]], n=2, **options):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == want


def test_prompts_of_token_ids(llm, client):
    ids = llm.text.encode(PROMPTS[0])
    (want,) = llm.generate([ids], SamplingParams(8))
    one = client.completions.create(model="demo", prompt=ids, max_tokens=8, temperature=0)
    two = client.completions.create(model="demo", prompt=[ids, ids], max_tokens=8, temperature=0, echo=True)
    assert one.choices[0].text == want.text
    assert [choice.text for choice in two.choices] == [PROMPTS[0] + want.text] * 2


def test_logprobs_are_generates(llm, client):
    (want,) = llm.generate([PROMPTS[2]], SamplingParams(10, logprobs=2))
    whole = client.completions.create(model="demo", prompt=PROMPTS[2], max_tokens=10, temperature=0, logprobs=2)
    given = whole.choices[0].logprobs
    assert given.token_logprobs == pytest.approx(want.logprobs)
    assert [len(top) for top in given.top_logprobs] == [2] * len(want.token_ids)
    assert given.text_offset[0] == 0
    assert given.text_offset == sorted(given.text_offset)
    messages = [{"role": "user", "content": "Größe"}]
    chat = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=10, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert text.startswith(chat.choices[0].message.content)
    assert all(entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs) for entry in content)
    parts = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=10, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    assert [
        entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content
    ] == content


def test_vllms_parameters_reach_the_sampler(llm, client):
    params = SamplingParams(12, temperature=1.0, top_k=5, min_p=0.02, repetition_penalty=1.3, seed=3, min_tokens=4)
    (want,) = llm.generate([PROMPTS[0]], params)
    extra = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.3, "min_tokens": 4}
    answer = client.completions.create(
        model="demo", prompt=PROMPTS[0], max_tokens=12, temperature=1, seed=3, extra_body=extra
    )
    assert answer.choices[0].text == want.text
    stop = want.token_ids[6]
    params = SamplingParams(12, stop_token_ids=(stop,), presence_penalty=0.5, frequency_penalty=0.25)
    (want,) = llm.generate([PROMPTS[0]], params)
    answer = client.completions.create(
        model="demo", prompt=PROMPTS[0], max_tokens=12, temperature=0, presence_penalty=0.5, frequency_penalty=0.25,
        extra_body={"stop_token_ids": [stop], "top_k": -1},
    )  # fmt: skip
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (want.text, want.finish_reason)


def test_temperature_is_openais_one_where_nobody_says(llm, client):
    (want,) = llm.generate([PROMPTS[0]], SamplingParams(16, temperature=1.0, seed=11))
    assert client.completions.create(model="demo", prompt=PROMPTS[0], seed=11).choices[0].text == want.text


def test_a_generation_config_decides(demo, start, tmp_path, llm, relist):
    (greedy,) = llm.generate([PROMPTS[0]], SamplingParams(4))
    shutil.copytree(demo, tmp_path / "bundle")
    (tmp_path / "bundle" / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 4}')
    relist(tmp_path / "bundle")
    with start(tmp_path / "bundle") as server:
        answer = httpx.post(f"{server.url}/completions", json={"prompt": PROMPTS[0]}).json()["choices"][0]
        assert answer["text"] == greedy.text
        assert server.stop() == 0


def test_many_at_once_answer_as_each_alone(llm, client):
    def one(seed):
        return client.completions.create(
            model="demo", prompt=PROMPTS[seed % 3], temperature=0.8, seed=seed, max_tokens=20
        ).choices[0].text  # fmt: skip

    want = [
        llm.generate([PROMPTS[seed % 3]], SamplingParams(20, temperature=0.8, seed=seed))[0].text for seed in range(48)
    ]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(one, range(48))) == want


def test_models_and_what_they_are_called(client, http):
    assert [model.id for model in client.models.list()] == ["demo", "again"]
    assert client.models.retrieve("again").id == "again"
    assert client.completions.create(model="again", prompt="a", max_tokens=1).model == "again"
    with pytest.raises(openai.NotFoundError, match="it is called demo, again"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-4", prompt="a")
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_reads_events(server):
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0, "stream": True})
    made = subprocess.run(
        ["curl", "-sN", f"{server.url}/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    events = [line.removeprefix("data: ") for line in made.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


def test_metrics_count_what_was_answered(server, client, until):
    def counts():
        values = server.metrics()
        return [values[name] for name in ("requests_total{ok}", "input_tokens_total", "output_tokens_total")]

    def all_counted():  # metrics come a moment after the answers that they count
        return server.metrics()["inflight_requests"] == 0 and counts() == (time.sleep(0.5) or counts())

    until(all_counted)
    before = counts()
    used = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=9, temperature=0).usage
    want = [before[0] + 1, before[1] + used.prompt_tokens, before[2] + used.completion_tokens]
    until(lambda: counts() == want)
    values = server.metrics()
    assert values["time_to_first_token_seconds_count"] >= values["requests_total{ok}"]
    until(lambda: server.metrics()["cache_pages_used"] == 0)
