"""Probes tell the truth: no queue keeps them waiting, and an engine that stands still is seen and started again."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading

import pytest

LIVE, READY = "/health/live", "/health/ready"
LONG = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000}
SHORT = {"text_input": "The number", "max_tokens": 8}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Probe:
    def __init__(self):
        self.port = free_port()
        self.flag = f"--probe-port={self.port}"

    def __call__(self, path):
        """The status and the line, or (None, "") where nobody answers."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode().strip()
            except (OSError, http.client.HTTPException):
                return None, ""


def read(events):
    """To the end, which comes with the server's."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        list(events)


@pytest.fixture
def probe():
    return Probe()


def test_streams_that_wait_for_one_slot_keep_no_probe_waiting(serve, own_repository, probe):
    config = own_repository / "deepseek_v2" / "config.pbtxt"
    running = 'key: "max_running" value { string_value: "%d" }'
    assert running % 4 in config.read_text()
    config.write_text(config.read_text().replace(running % 4, running % 1))
    server = serve(own_repository, probe.flag)
    assert server.wait_for(lambda: probe(READY) == (200, "ok"))
    streams = [server.stream(**LONG) for _ in range(3)]
    next(streams[0])
    others = [threading.Thread(target=read, args=(events,), daemon=True) for events in streams[1:]]
    try:
        for thread in others:
            thread.start()
        assert server.wait_for(lambda: server.metric("deepseek_trt_queued_requests") == 2)
        assert server.metric("deepseek_trt_running_requests") == 1
        assert 0 < server.metric("deepseek_trt_cache_usage_ratio") <= 1
        for _ in range(20):
            assert probe(LIVE) == (200, "ok")
        assert probe(READY)[0] == 200
    finally:
        server.kill()
        for thread in others:
            thread.join(30)


def test_not_ready_while_full_or_ending_but_alive(serve, demo_repository, probe):
    server = serve(demo_repository, probe.flag)
    assert server.wait_for(lambda: probe(READY)[0] == 200)
    running = [server.stream(**LONG) for _ in range(4)]
    for events in running:
        next(events)
    assert server.wait_for(lambda: probe(READY) == (503, "deepseek_v2: no request is taken now"))
    assert probe(LIVE) == (200, "ok")
    for events in running[1:]:
        events.close()
    assert server.wait_for(lambda: probe(READY)[0] == 200)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for(lambda: probe(READY) == (503, "the server is ending"))
    assert probe(LIVE)[0] == 200
    running[0].close()
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_engine_is_seen_and_started_again(serve, demo_repository, probe, busy):
    server = serve(demo_repository, probe.flag, "--stall-seconds=3")
    assert server.wait_for(lambda: probe(LIVE)[0] == 200)
    right = server.generate(**SHORT).json["text_output"]
    events = server.stream(**LONG) if busy else iter([{}])
    next(events)
    (stub,) = server.stub_pids()
    os.kill(stub, signal.SIGSTOP)
    assert server.wait_for(lambda: probe(LIVE)[0] == 503)
    assert probe(READY)[0] == 503
    assert server.wait_for(lambda: probe(LIVE)[0] == 200 and probe(READY)[0] == 200)
    assert "the engine of deepseek_v2 stands still" in server.log()
    assert server.stub_pids() not in ([], [stub])
    assert server.generate(**SHORT).json["text_output"] == right
    assert server.stop() == 0
    assert server.left == []


def test_a_stopped_server_is_started_again(serve, demo_repository, probe):
    server = serve(demo_repository, probe.flag, "--stall-seconds=3")
    assert server.wait_for(lambda: probe(LIVE)[0] == 200)
    os.kill(server.server_pid(), signal.SIGSTOP)
    assert server.wait_for(lambda: probe(LIVE)[0] == 503)
    assert server.wait_for(lambda: probe(READY)[0] == 200)
    assert "the server has not answered" in server.log()
    assert server.generate(**SHORT).status == 200


def test_an_idle_engine_and_an_unloaded_model_are_no_fault(serve, demo_repository, probe):
    server = serve(demo_repository, probe.flag, "--stall-seconds=1.5")
    assert server.wait_for(lambda: probe(READY)[0] == 200)
    (pid,) = server.stub_pids()
    beats = server.metric("deepseek_trt_heartbeats_total")
    assert server.wait_for(lambda: server.metric("deepseek_trt_heartbeats_total") > beats + 3)
    assert server.stub_pids() == [pid]
    assert server.manage("unload").status == 200
    assert server.wait_for(lambda: probe(READY) == (503, "a model is not loaded"))
    assert not server.wait_for(lambda: probe(LIVE)[0] != 200, seconds=4)
    assert server.manage("load").status == 200
    assert server.wait_for(lambda: probe(READY)[0] == 200)
    assert "starting the server again" not in server.log()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--probe-port=70000",), "--probe-port '70000'"),
        (("--probe-port=81.5",), "whole number"),
        (("--probe-port",), "--probe-port None"),
        (("--probe-port={taken}",), "cannot be had"),
        (("--probe-address=127.0.0.1",), "without --probe-port"),
        (("--stall-seconds=0",), "--stall-seconds '0'"),
        (("--stall-seconds=nan",), "--stall-seconds 'nan'"),
        (("--probe-port={free}", "--allow-metrics=false"), "--allow-metrics takes away"),
    ],
)
def test_flags_that_cannot_be_had(serve, demo_repository, flags, words):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"taken": taken.getsockname()[1], "free": free_port()}
        with pytest.raises(RuntimeError, match=words):
            serve(demo_repository, *(flag.format(**ports) for flag in flags))
