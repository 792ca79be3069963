"""What a server does not take is said in OpenAI's form, by name, and costs no other request anything."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def error_of(response, status):
    """The error object, whole."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


REFUSED = [
    # field, value, status
    ("model", "other", 404),
    ("model", 3, 400),
    ("max_tokens", 0, 400),
    ("max_tokens", -1, 400),
    ("max_tokens", "5", 400),
    ("max_tokens", 1.5, 400),
    ("max_tokens", 2**31, 400),
    ("temperature", -1, 400),
    ("temperature", "hot", 400),
    ("top_p", 0, 400),
    ("top_p", 1.5, 400),
    ("top_k", -2, 400),
    ("min_p", 2, 400),
    ("presence_penalty", 3, 400),
    ("frequency_penalty", -3, 400),
    ("repetition_penalty", 0, 400),
    ("seed", -1, 400),
    ("seed", 1.5, 400),
    ("n", 0, 400),
    ("n", 65, 400),
    ("n", True, 400),
    ("stop", 5, 400),
    ("stop", [""], 400),
    ("stop", ["x"] * 200, 400),
    ("stop_token_ids", [-1], 400),
    ("stop_token_ids", [99999], 400),
    ("min_tokens", 99, 400),
    ("ignore_eos", "yes", 400),
    ("timeout_ms", 0, 400),
    ("stream", "yes", 400),
    ("stream_options", {"include_usage": True}, 400),
    ("user", 5, 400),
    ("foo", 1, 400),
    ("length_penalty", 2, 422),
    ("use_beam_search", True, 422),
    ("skip_special_tokens", False, 422),
    ("include_stop_str_in_output", True, 422),
    ("prompt_logprobs", 1, 422),
    ("truncate_prompt_tokens", 5, 422),
    ("bad_words", ["x"], 422),
    ("allowed_token_ids", [1], 422),
    ("store", True, 422),
]
OF_COMPLETION = [
    ("prompt", [], 400),
    ("prompt", 5, 400),
    ("prompt", [1, "a"], 400),
    ("prompt", ["a", [1]], 400),
    ("prompt", [99999], 400),
    ("prompt", [-1], 400),
    ("prompt", [[]], 400),
    ("prompt", {"a": 1}, 400),
    ("prompt", "word " * 3000, 400),
    ("prompt", "x" * 200_000, 400),
    ("best_of", 2, 422),
    ("suffix", "end", 422),
    ("logprobs", 21, 400),
    ("logprobs", -1, 400),
    ("logprobs", True, 400),
    ("messages", HI, 400),
]
OF_CHAT = [
    ("messages", [], 400),
    ("messages", "hi", 400),
    ("messages", ["hi"], 400),
    ("messages", [{"role": "user"}], 400),
    ("messages", [{"content": "hi"}], 400),
    ("messages", [{"role": "robot", "content": "hi"}], 400),
    ("messages", [{"role": "user", "content": "hi", "audio": {"id": 1}}], 400),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], 400),
    ("prompt", "hi", 400),
    ("max_completion_tokens", 0, 400),
    ("top_logprobs", 2, 400),
    ("tools", [{"type": "retrieval"}], 400),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], 400),
    ("tools", [TOOL, TOOL], 400),
    ("tools", [TOOL], 422),
    ("tool_choice", "required", 400),
    ("tool_choice", "maybe", 400),
    ("tool_choice", {"type": "function", "function": {"name": "g"}}, 400),
    ("functions", [{"name": "f"}], 422),
    ("function_call", "auto", 422),
    ("modalities", ["audio"], 422),
    ("audio", {"voice": "x"}, 422),
    ("reasoning_effort", "high", 422),
    ("service_tier", "flex", 422),
    ("chat_template_kwargs", {"thinking": True}, 422),
    ("chat_template_kwargs", {"messages": []}, 400),
    ("documents", [{"text": "a"}], 422),
]
TABLE = [
    *((path, *row) for path in (COMPLETION, CHAT) for row in REFUSED),
    *((COMPLETION, *row) for row in OF_COMPLETION),
    *((CHAT, *row) for row in OF_CHAT),
]


def body_of(path, **fields):
    base = {"prompt": "Return"} if path == COMPLETION else {"messages": HI}
    return {**base, "max_tokens": 3, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "field", "value", "status"), TABLE)
def test_a_wrong_field_is_named(http, path, field, value, status, stream):
    fields = {"stream": stream, field: value} if field != "stream_options" or not stream else {field: value}
    error = error_of(http.post(path, json=body_of(path, **fields)), status)
    assert field in (error["param"], *error["message"].replace("[", " ").replace(":", " ").split())


NEUTRAL = {
    "user": "me", "metadata": {"a": "b"}, "n": 1, "logit_bias": {}, "stop": None, "length_penalty": 1.0,
    "use_beam_search": False, "skip_special_tokens": True, "spaces_between_special_tokens": True, "store": False,
    "bad_words": [], "seed": 2**64 - 1, "presence_penalty": 0, "service_tier": "auto", "stream_options": None,
}  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_neutral_values_and_nulls_are_taken(http, path):
    assert http.post(path, json=body_of(path, **NEUTRAL)).status_code == 200
    assert http.post(path, json=body_of(path, **dict.fromkeys(NEUTRAL))).status_code == 200


def test_echoed_messages_of_openais_clients_are_taken(http):
    said = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [*HI, said, {"role": "user", "content": [{"type": "text", "text": "go on"}], "name": "me"}]
    assert http.post(CHAT, json={"messages": messages, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"nonsense", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "out of range"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"text"', "object"),
        (b"[" * 100_000, "object"),
        (b'{"a":' * 100_000, "not"),
        (b'{"prompt": ' + b"[" * 5000, "prompt"),
        (b'{"max_tokens": 1}', "prompt"),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "twice"),
        (b'{"prompt": "a", "logit_bias": {"1": 2, "1": 3}}', "twice"),
        (b'{"prompt": "a", "seed": ' + b"1" * 6000 + b"}", "seed"),
    ],
)
def test_bodies_that_are_none(http, content, words):
    error = error_of(http.post(COMPLETION, content=content), 400)
    assert words in error["message"]


def nested(depth):
    value = {"type": "object"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_deep_schemas_are_refused_in_a_sentence(http, depth):
    tool = '{"type":"function","function":{"name":"f","parameters":' + '{"a":' * depth + "1" + "}" * depth + "}}"
    response = http.post(CHAT, content='{"messages":[{"role":"user","content":"a"}],"tools":[' + tool + "]}")
    assert response.status_code in (400, 422)
    assert "Error:" not in response.json()["error"]["message"]


def test_paths_and_methods_that_there_are_not(http):
    assert "/v1/nothing" in error_of(http.post("/v1/nothing", json={}), 404)["message"]
    error_of(http.get(COMPLETION), 405)
    assert http.get(COMPLETION).headers["allow"]
    assert "/v1/embeddings" in error_of(http.post("/v1/embeddings", json={"input": "a"}), 404)["message"]


def test_large_bodies_are_not_read(server, http):
    large = b'{"prompt": "' + b"a" * (17 * 2**20) + b'"}'
    assert error_of(http.post(COMPLETION, content=iter([large[:100], large[100:]])), 413)["code"] == "body_too_large"
    host, port = server.root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:  # announced, and never sent
        connection.sendall(f"POST {COMPLETION} HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n".encode())
        assert b" 413 " in connection.recv(65536)


def test_too_long_prompts_have_openais_code(http):
    error = error_of(http.post(COMPLETION, json={"prompt": "a " * 4000}), 400)
    assert error["code"] == "context_length_exceeded"


def test_a_deadline_ends_the_answer(http):
    body = body_of(COMPLETION, max_tokens=2000, ignore_eos=True, timeout_ms=30)
    assert "timeout_ms 30" in error_of(http.post(COMPLETION, json=body), 408)["message"]
    with http.stream("POST", COMPLETION, json={**body, "stream": True}) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert "timeout_ms 30" in json.loads(events[-2])["error"]["message"]
    assert events[-1] == "[DONE]"


def test_keys(demo, start, tmp_path):
    (tmp_path / "keys").write_text("second\n\n  third\n")
    with start(demo, "--api-key", "first", "--api-key-file", tmp_path / "keys") as server:
        body = body_of(COMPLETION)

        def ask(**headers):
            return httpx.post(f"{server.url}/completions", json=body, headers=headers)

        for key in ("first", "second", "third"):
            assert ask(authorization=f"Bearer {key}").status_code == 200
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first"},
            {"authorization": "first"},
        ):
            assert error_of(ask(**given), 401)["code"] == "invalid_api_key"
        error_of(ask(authorization=b"Bearer \xff"), 401)
        error_of(httpx.get(f"{server.url}/models"), 401)
        assert httpx.get(f"{server.root}/health").status_code == 200
        assert httpx.get(f"{server.root}/metrics").status_code == 200
        assert server.stop() == 0
