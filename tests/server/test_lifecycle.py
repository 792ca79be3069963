"""Clients that go away, servers that are full, killed, ended, spoiled or started again."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from deepseek_trt.engines.model_repository.folder import write_manifest

ENDLESS = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000}  # seconds of work, unless somebody ends it
SHORT = {"text_input": "The number", "max_tokens": 8}
FAULT = """
_decode, _steps = OrtSession.decode, iter(range(50))
def _fail(self, *inputs):
    if next(_steps, None) is None:
        raise OSError("the device is gone")
    return _decode(self, *inputs)
OrtSession.decode = _fail
"""


def idle(server):
    return server.metric("deepseek_trt_inflight_requests") == server.metric("deepseek_trt_cache_pages_used") == 0


def cancelled(server):
    return server.metric("deepseek_trt_cancellations_total", model="deepseek_v2")


def tokens_out(server):
    return server.metric("deepseek_trt_output_tokens_total", model="deepseek_v2")


def leave_http(server, grpc_call):
    events = server.stream(**ENDLESS)
    assert len(list(islice(events, 2))) == 2
    events.close()


def leave_grpc(server, grpc_call):
    (answers,) = grpc_call([{**ENDLESS, "stream": True}], cancel_after=2)
    assert [sorted(answer) for answer in answers][2:] == [["left"]]


@pytest.mark.parametrize("leave", [leave_http, leave_grpc])
def test_a_client_that_leaves_frees_its_slot(server, grpc_call, leave):
    assert server.wait_for(lambda: idle(server))
    before, made = cancelled(server), tokens_out(server)
    leave(server, grpc_call)
    assert server.wait_for(lambda: cancelled(server) == before + 1 and idle(server))
    assert tokens_out(server) - made < ENDLESS["max_tokens"]


def test_a_full_server_refuses_and_takes_again(serve, demo_repository, grpc_call):
    server = serve(demo_repository)
    running = [server.stream(**ENDLESS) for _ in range(4)]
    assert all(next(events)["text_output"] is not None for events in running)
    reply = server.generate(**SHORT)
    (answers,) = grpc_call([SHORT], on=server)
    assert "4 requests are in flight" in str(reply.json)
    assert reply.status >= 400
    assert "4 requests are in flight" in answers[0]["error"]
    for events in running:
        events.close()
    assert server.wait_for(lambda: idle(server))
    assert server.generate(**SHORT).status == 200
    assert server.metric("deepseek_trt_requests_total", result="refused") == 2


def test_a_deadline_ends_an_answer(server):
    assert "timeout_ms" in str(server.generate(**ENDLESS, timeout_ms=100).json)
    events = list(server.stream(**ENDLESS, timeout_ms=100))
    assert "timeout_ms" in events[-1]["error"]
    assert server.wait_for(lambda: idle(server))


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_stub_fails_its_streams_and_comes_back(serve, demo_repository, busy):
    """2.51 may crash as a whole when a stub dies at work: serve.sh then ends, and says so by its exit code."""
    server = serve(demo_repository)
    right = server.generate(**SHORT).json["text_output"]
    events = server.stream(**ENDLESS) if busy else iter([{}])
    next(events)
    (stub,) = server.stub_pids()
    os.kill(stub, signal.SIGKILL)
    with contextlib.suppress(OSError, http.client.HTTPException):
        assert not any(event.get("finish_reason") for event in events)

    def ended_or_back():
        return server.process.poll() is not None or (server.stub_pids() not in ([], [stub]) and server.ready())

    assert server.wait_for(ended_or_back)
    assert busy or server.process.returncode is None
    assert server.process.returncode != 0
    again = serve(demo_repository) if server.process.returncode else server
    assert again.generate(**SHORT).json["text_output"] == right


def test_a_failing_engine_fails_its_streams_and_the_model_is_not_ready_until_loaded_again(serve, own_repository):
    version = own_repository / "deepseek_v2" / "1"
    with (version / "runtime" / "deepseek_trt" / "engines" / "sessions" / "ort.py").open("a") as module:
        module.write(FAULT)
    facts = json.loads((version / "manifest.json").read_text())
    write_manifest(version, {name: value for name, value in facts.items() if name != "files"})
    server = serve(own_repository)
    events = list(server.stream(**ENDLESS))
    assert "the device is gone" in events[-1]["error"]
    assert server.wait_for(lambda: not server.ready())
    assert server.manage("load").status == 200
    assert server.generate(**SHORT).status == 200


@pytest.mark.parametrize("tokens", [300, 2000])
def test_sigterm_ends_every_stream_and_leaves_nothing(serve, own_repository, tokens):
    """Answers that end in time end as they should, the others with an error; then it starts again."""
    config = own_repository / "deepseek_v2" / "config.pbtxt"
    drain = 'key: "drain_ms" value { string_value: "%s" }'
    assert drain % 5000 in config.read_text()
    config.write_text(config.read_text().replace(drain % 5000, drain % 1000))
    server = serve(own_repository)
    inputs = {**ENDLESS, "max_tokens": tokens, "min_tokens": tokens}
    streams = [server.stream(**inputs) for _ in range(3)]
    for events in streams:
        next(events)
    with ThreadPoolExecutor(3) as threads:
        rests = [threads.submit(list, events) for events in streams]
        code = server.stop()
        ends = [rest.result()[-1] for rest in rests]
    assert code == 0, server.log_tail()
    assert server.left == []
    assert all(end.get("finish_reason") == "length" or "unloaded" in end["error"] for end in ends)
    assert serve(own_repository).generate(**SHORT).status == 200


@pytest.mark.parametrize(
    "file", ["bundle/weights.safetensors", "runtime/deepseek_trt/engines/generation/scheduler.py", "model.py"]
)
def test_a_spoiled_file_is_refused_at_load_with_the_reason(serve, own_repository, file):
    spoiled = own_repository / "deepseek_v2" / "1" / file
    data = bytearray(spoiled.read_bytes())
    data[len(data) // 2] ^= 1
    spoiled.write_bytes(bytes(data))
    with pytest.raises(RuntimeError, match="is not the file that was written"):
        serve(own_repository)


def test_a_missing_file_is_refused_at_load(serve, own_repository):
    (own_repository / "deepseek_v2" / "1" / "bundle" / "tokenizer.json").unlink()
    with pytest.raises(RuntimeError, match=r"tokenizer\.json is missing"):
        serve(own_repository)


def test_a_missing_model_py_is_refused_before_the_server_hangs(serve, own_repository):
    (own_repository / "deepseek_v2" / "1" / "model.py").unlink()
    with pytest.raises(RuntimeError, match=r"model\.py is missing"):
        serve(own_repository)


def test_models_are_unloaded_and_loaded_by_the_servers_own_api(serve, demo_repository):
    """The next process starts while the one before ends; the server lives through all of it, and counts on."""
    server = serve(demo_repository)
    right, pid, rounds = server.generate(**SHORT).json["text_output"], server.server_pid(), 5
    for _ in range(rounds):
        assert server.manage("unload").status == 200
        assert server.wait_for(lambda: not server.ready())
        assert server.manage("load").status == 200
        assert server.generate(**SHORT).json["text_output"] == right
    assert server.wait_for(lambda: server.metric("deepseek_trt_requests_total", result="ok") == rounds + 1)
    assert server.server_pid() == pid


def test_a_model_that_is_loaded_while_its_last_answer_runs(serve, demo_repository, grpc_call):
    """Two processes hold the model for a while, and show the same metrics."""
    server = serve(demo_repository)
    pid = server.server_pid()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(grpc_call, [{**ENDLESS, "stream": True}], on=server)
        assert server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 1)
        assert server.manage("unload").status == 200
        assert server.manage("load").status == 200
        assert server.generate(**SHORT).status == 200
        ((*_, end),) = call.result()
    assert end.get("finish_reason") == "length" or "unloaded" in end["error"]
    assert server.wait_for(lambda: len(server.stub_pids()) == 1)
    assert server.generate(**SHORT).status == 200
    assert server.server_pid() == pid
