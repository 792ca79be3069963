"""The lines of docs/openai.md and README, by the real curl."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


def curl(*arguments):
    made = subprocess.run(["curl", "-s", *arguments], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_whole_answers_with_curls_own_content_type(server):
    """-d alone says application/x-www-form-urlencoded."""
    body = '{"prompt": "The number of", "max_tokens": 8, "temperature": 0}'
    answer = json.loads(curl(f"{server.url}/completions", "-d", body))
    assert answer["usage"]["completion_tokens"] == 8
    assert json.loads(curl(f"{server.url}/models"))["data"][0]["id"] == "demo"


def test_a_streamed_chat(server):
    body = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0, "stream": true}'
    events = [
        line.removeprefix("data: ") for line in curl("-N", f"{server.url}/chat/completions", "-d", body).split("\n\n")
    ]
    assert events[-2:] == ["[DONE]", ""]
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-2])
    whole = json.loads(curl(f"{server.url}/chat/completions", "-d", body.replace(', "stream": true', "")))
    assert text == whole["choices"][0]["message"]["content"]


def test_errors_and_their_statuses(server):
    made = curl("-w", "\n%{http_code}", f"{server.url}/completions", "-d", '{"prompt": "a", "unknown": 1}')
    body, _, status = made.rpartition("\n")
    assert (status, json.loads(body)["error"]["param"]) == ("400", "unknown")
    large = (
        f"{server.url}/completions",
        "-H",
        "Expect: 100-continue",
        "-d",
        json.dumps({"prompt": "a", "max_tokens": 1}),
    )
    assert json.loads(curl(*large))["usage"]["completion_tokens"] == 1
