"""Requests that cannot be answered: each gets an error that names what is wrong, and the server goes on."""

from __future__ import annotations

import json

import pytest

GOOD = {"text_input": "The", "max_tokens": 4}
LONG = "word " * 4000


@pytest.fixture(autouse=True)
def _still_answers(server):
    yield
    assert server.generate(**GOOD).status == 200


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"max_tokens": 4}, "text_input"),
        ({"text_input": ""}, "empty"),
        ({"text_input": LONG}, "tokens"),
        ({"text_input": "The", "max_tokens": 0}, "max_tokens 0"),
        ({"text_input": "The", "max_tokens": -5}, "max_tokens -5"),
        ({"text_input": "The", "max_tokens": 2**31}, "max_tokens"),
        ({"text_input": "The", "temperature": -1.0}, "temperature"),
        ({"text_input": "The", "top_p": 1.5}, "top_p"),
        ({"text_input": "The", "top_k": -2}, "top_k"),
        ({"text_input": "The", "repetition_penalty": 0.0}, "repetition_penalty"),
        ({"text_input": "The", "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"text_input": "The", "bad_words": ["dog"]}, "bad_words"),
        ({"text_input": "The", "timeout_ms": 0}, "timeout_ms"),
        ({"text_input": "The", "temprature": 0.5}, "temprature"),
        ({"text_input": "The", "messages": "[]"}, "either"),
        ({"messages": "no json"}, "messages"),
        ({"messages": "[]"}, "messages"),
        ({"messages": json.dumps([{"role": "user"}])}, "content"),
        ({"messages": r'[{"role": "user", "content": "\ud83d"}]'}, "half a character"),
        ({"messages": "[" * 5000}, "messages is not JSON"),
        ({"text_input": "The", "stop_words": ["a" * 1025]}, "1024 characters"),
        ({"text_input": "The", "stop_words": ["a"] * 129}, "128 strings"),
        ({"text_input": "The", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"text_input": "The", "stop_token_ids": [1 << 30]}, "stop_token_ids"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_over_http(server, endpoint, inputs, words):
    reply = server.post(f"/v2/models/deepseek_v2/{endpoint}", inputs)
    assert reply.status == 400
    assert words in str(reply.json)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'{"text_input": "\xff\xfe"}',
        b'{"text_input": "\\ud83d"}',
        b'{"text_input": 3}',
        b'{"text_input": "The", "stop_token_ids": ["a"]}',
        b'{"text_input": ["a", "b"]}',
        b'{"text_input": "The", "max_tokens": "many"}',
        b'{"text_input": "The", "max_tokens": 1.5}',
        b'{"text_input": "The", "max_tokens": NaN}',
        b'{"text_input": "The", "max_tokens": 1e30}',
        b'{"text_input": "The", "temperature": "hot"}',
        b'{"text_input": "The", "seed": -1}',
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_bodies_that_are_no_request(server, endpoint, body):
    """The server itself refuses what does not fit the tensors' types, with 400 or 500 as it likes."""
    reply = server.post(f"/v2/models/deepseek_v2/{endpoint}", body)
    assert reply.status in (400, 500)
    assert "error" in str(reply.json)


def test_other_models_and_paths(server):
    assert server.generate("deepseek_v3", **GOOD).status in (400, 404)
    assert server.post("/v2/models/deepseek_v2/generation", GOOD).status in (400, 404)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"max_tokens": 4}, "text_input"),
        ({"text_input": ""}, "empty"),
        ({"text_input": {"bytes": "fffe41"}}, "UTF-8"),
        ({"text_input": "The", "stop_words": {"bytes": "ff"}}, "stop_words is not UTF-8"),
        ({"messages": {"bytes": "eda0bd"}}, "messages is not UTF-8"),
        ({"text_input": LONG}, "tokens"),
        ({"text_input": "The", "max_tokens": {"dtype": "INT64", "value": 4}}, "max_tokens"),
        ({"text_input": "The", "max_tokens": {"dtype": "FP32", "value": 4.0}}, "max_tokens"),
        ({"text_input": "The", "max_tokens": -1}, "max_tokens -1"),
        ({"text_input": "The", "temperature": float("nan")}, "temperature"),
        ({"text_input": "The", "temperature": float("inf")}, "temperature"),
        ({"text_input": "The", "nonsense": 1}, "nonsense"),
        ({"text_input": {"dtype": "INT32", "value": 4}}, "text_input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_over_grpc(grpc_call, inputs, words):
    (answers,) = grpc_call([inputs])
    assert len(answers) == 1
    assert words in answers[0]["error"]
