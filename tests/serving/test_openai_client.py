"""What openai-python makes of this server: classes of errors, retries, streams that are left, both of its clients."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

HI = [{"role": "user", "content": "hi"}]
LONG = {"model": "demo", "prompt": "Return", "max_tokens": 2000, "temperature": 0, "extra_body": {"ignore_eos": True}}


def client_of(server, **options):
    return openai.OpenAI(base_url=server.url, **{"api_key": "unused", "max_retries": 0, **options})


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "status", "fields"),
    [
        (openai.BadRequestError, 400, {"temperature": -1}),
        (openai.BadRequestError, 400, {"extra_body": {"unknown": 1}}),
        (openai.NotFoundError, 404, {"model": "other"}),
        (openai.UnprocessableEntityError, 422, {"extra_body": {"use_beam_search": True}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_classes(client, kind, status, fields, stream):
    given = {"model": "demo", "max_tokens": 3, "stream": stream, **fields}
    for ask in (
        lambda: client.completions.create(prompt="a", **given),
        lambda: client.chat.completions.create(messages=HI, **given),
    ):
        with pytest.raises(kind) as caught:
            ask()
        assert caught.value.status_code == status
        assert caught.value.body["message"] in str(caught.value)


def test_a_wrong_key_is_an_authentication_error(demo, start):
    with start(demo, "--served-model-name", "demo", "--api-key", "right") as server:
        with client_of(server, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server, api_key="right") as client:
            assert [model.id for model in client.models.list()] == ["demo"]
        assert server.stop() == 0


def test_a_full_server_is_a_rate_limit_error_and_left_streams_free_it(demo, start, until):
    with start(demo, "--served-model-name", "demo", "--max-inflight", "1") as server, client_of(server) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="demo", prompt="a", max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        stream.close()
        until(lambda: server.metrics()["inflight_requests"] == 0)
        assert client.completions.create(model="demo", prompt="a", max_tokens=1).usage.completion_tokens == 1
        until(lambda: server.metrics()["cache_pages_used"] == 0)
        assert server.metrics()["cancellations_total"] == 1
        assert server.stop() == 0


def test_what_fails_in_a_stream_is_an_api_error(client):
    given = {**LONG, "extra_body": {"ignore_eos": True, "timeout_ms": 40}}
    with pytest.raises(openai.APIError, match="timeout_ms 40"):
        list(client.completions.create(**given, stream=True))
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**given)
    assert caught.value.status_code == 408


def test_the_asynchronous_client_and_its_cancelled_answers(server, until):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
            several = [
                client.chat.completions.create(model="demo", messages=HI, max_tokens=9, temperature=0, n=2)
                for _ in range(4)
            ]
            answers = await asyncio.gather(*several)
            whole = asyncio.create_task(client.completions.create(**LONG))
            while server.metrics()["inflight_requests"] == 0:
                await asyncio.sleep(0.01)
            whole.cancel()
            await asyncio.gather(whole, return_exceptions=True)
            return {choice.message.content for answer in answers for choice in answer.choices}

    assert len(asyncio.run(ask())) == 1
    until(lambda: server.metrics()["inflight_requests"] == 0)


def test_the_streaming_helper_parses_a_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "integer", "maximum": 9}}}
    given = {"model": "demo", "messages": HI, "temperature": 1, "seed": 1, "max_tokens": 60}
    with client.chat.completions.stream(**given, response_format=form) as stream:
        kinds = [event.type for event in stream]
        content = stream.get_final_completion().choices[0].message.content
    assert isinstance(json.loads(content), int)
    assert "content.delta" in kinds
    assert kinds[-1] == "content.done"
