"""Two replicas of examples/dynamo/worker.py behind Dynamo's own frontend; they find each other by files."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from deepseek_trt import LLM, SamplingParams

if importlib.util.find_spec("dynamo") is None or importlib.util.find_spec("dynamo.frontend") is None:
    pytest.skip("ai-dynamo is not installed", allow_module_level=True)

WORKER = Path(__file__).parents[2] / "examples" / "dynamo" / "worker.py"
WAIT = 90.0  # seconds before a test that waits gives up
PROMPT = "The number of"
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@contextmanager
def process(folder, name, *arguments):
    env = {**os.environ, "DYN_FILE_KV": str(folder / "kv"), "HF_HUB_OFFLINE": "1"}
    with (folder / name).open("w") as log:
        started = subprocess.Popen([sys.executable, *map(str, arguments)], env=env, stdout=log, stderr=log)
    try:
        yield
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def handled(folder, name):
    return (folder / name).read_text().count("request received")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dynamo")


@pytest.fixture(scope="module")
def bundle(demo_checkpoint, bundle_of):
    return bundle_of(demo_checkpoint).path


@pytest.fixture(scope="module")
def http(folder, bundle):
    """A client of the frontend, once both replicas have answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = (WORKER, bundle, "--name", "demo", "--backend", "ort")
    found = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
    frontend = ("-m", "dynamo.frontend", *found, "--http-host", "127.0.0.1", "--http-port", port)
    with (
        process(folder, "one", *worker),
        process(folder, "two", *worker),
        process(folder, "frontend", *frontend),
        httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=WAIT) as client,
    ):
        deadline = time.monotonic() + WAIT
        while not (handled(folder, "one") and handled(folder, "two")):
            assert time.monotonic() < deadline, (folder / "one").read_text()[-2000:]
            try:
                ask(client, max_tokens=1)
            except httpx.TransportError:
                time.sleep(0.2)
        yield client


def ask(client, **fields):
    return client.post("/completions", json={"model": "demo", "prompt": PROMPT, "temperature": 0, **fields})


def test_each_replica_answers_as_the_llm_does(http, folder, bundle):
    with LLM.open(bundle, backend="ort") as llm:
        (right,) = llm.generate([PROMPT], SamplingParams(max_tokens=12))
    before = handled(folder, "one"), handled(folder, "two")
    answers = [ask(http, max_tokens=12).json()["choices"][0] for _ in range(4)]
    assert {(answer["text"], answer["finish_reason"]) for answer in answers} == {(right.text, "length")}
    assert handled(folder, "one") > before[0]
    assert handled(folder, "two") > before[1]


def test_stops_guides_and_log_probabilities(http):
    answer = ask(http, max_tokens=40, stop=[" same"], logprobs=1).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert " same" not in answer["text"]
    assert all(value <= 0 for value in answer["logprobs"]["token_logprobs"])
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 200,
        "response_format": form,
    }
    content = http.post("/chat/completions", json={**body, "temperature": 0}).json()["choices"][0]["message"]["content"]
    assert content.startswith("{")
    assert '"a"' in content


def test_a_stream_that_is_left_holds_up_nothing(http):
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 2000, "stream": True, "nvext": {}}
    with http.stream("POST", "/completions", json=body) as answer:
        next(answer.iter_lines())
    assert ask(http, max_tokens=3).status_code == 200


def test_what_is_not_supported_is_refused_by_name(http):
    refused = ask(http, n=2, temperature=1)
    assert refused.status_code == 400
    assert "n 2" in refused.text
