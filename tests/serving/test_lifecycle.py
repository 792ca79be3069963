"""Full, leaving, draining, ending: no slot is lost, and both processes end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys

import httpx
import pytest

LONG = {"prompt": "Return", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


def test_full_is_429_and_the_slot_of_who_leaves_is_free_at_once(demo, start, until):
    """Each answer would take 2,000 tokens: that far fewer were made shows that leaving ends them."""
    with start(demo, "--max-inflight", "2", "--max-running", "1") as server:
        url = f"{server.url}/completions"

        def taken():
            return server.metrics()["inflight_requests"]

        with httpx.Client(timeout=60) as client:
            with client.stream("POST", url, json={**LONG, "stream": True}) as first:
                lines = first.iter_lines()  # httpx closes an answer whose lines nobody holds
                next(lines)
                with client.stream("POST", url, json={**LONG, "stream": True}):  # waits for the first
                    until(lambda: taken() == 2)
                    full = client.post(url, json=LONG)
                    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
                    assert full.json()["error"]["type"] == "rate_limit_error"
                    assert client.post(url, json={**LONG, "stream": True}).status_code == 429
                until(lambda: taken() == 1)  # who waited has left
            until(lambda: taken() == 0)  # and who was answered
        host, port = server.root.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as whole:  # whose answer is not streamed
            body = httpx.Request("POST", url, json=LONG).content
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            whole.sendall(head + body)
            until(lambda: taken() == 1)
        until(lambda: taken() == 0)
        until(lambda: server.metrics()["cache_pages_used"] == 0)  # freed by the engine's next step
        values = server.metrics()
        assert values["cancellations_total"] == 3
        assert values["output_tokens_total"] < 3 * 2000
        assert httpx.post(url, json={**LONG, "max_tokens": 3}).status_code == 200
        assert httpx.post(url, json={**LONG, "max_tokens": 3, "n": 2}).status_code == 200
        assert server.stop() == 0


def test_a_cache_shorter_than_the_model_is_served_and_named(demo, start):
    with start(demo, "--cache-mib", "1") as server:
        (line,) = (line for line in server.lines if "tokens per request" in line)
        served = int(line.split()[0])
        assert line.startswith(f"{served} tokens per request, of the model's 2048: ")
        (model,) = httpx.get(f"{server.url}/models").json()["data"]
        assert model["max_model_len"] == served < 2048
        whole = httpx.post(
            f"{server.url}/completions", json={**LONG, "max_tokens": served - 1, "prompt": [5]}, timeout=60
        )
        assert whole.json()["usage"]["total_tokens"] == served
        longer = httpx.post(f"{server.url}/completions", json={**LONG, "prompt": [5] * served})
        assert longer.status_code == 400
        assert server.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(demo, start, how):
    with start(demo) as server:
        body = {**LONG, "max_tokens": 600, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(how)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert server.wait() == 0
        assert "Traceback" not in server.said


def test_while_it_drains_nothing_is_taken_and_health_says_so(demo, start, until):
    with start(demo) as server, httpx.Client(timeout=60) as client:
        with httpx.stream("POST", f"{server.url}/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert client.get(f"{server.root}/health").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            until(lambda: client.get(f"{server.root}/health").status_code == 503)
            refused = client.post(f"{server.url}/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
            server.process.send_signal(signal.SIGTERM)  # hurry
            with pytest.raises(httpx.HTTPError):
                list(lines)
        assert server.wait() == 0


def test_answers_that_take_too_long_end_with_an_error(demo, start):
    with start(demo, "--drain-seconds", "0") as server:
        with httpx.stream("POST", f"{server.url}/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-2]
        assert server.wait() == 0


def test_a_killed_engine_ends_the_server_with_an_error(demo, start):
    with start(demo) as server:
        with httpx.stream("POST", f"{server.url}/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(server.engine, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert "the engine's process has ended" in rest[-2]
        assert server.wait() == 1
        assert "error: the engine's process has ended (killed by signal 9)" in server.said
        assert "Traceback" not in server.said


def test_a_killed_server_takes_the_engine_with_it(demo, start, until, alive):
    with start(demo) as server:
        engine = server.engine
        server.process.kill()
        server.wait()
        until(lambda: not alive(engine))


def test_who_leaves_before_the_body_is_whole_is_no_error(demo, start, until):
    with start(demo) as server:
        host, port = server.root.removeprefix("http://").split(":")
        for sent in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
        assert httpx.post(f"{server.url}/completions", json={**LONG, "max_tokens": 3}).status_code == 200
        assert server.stop() == 0
        assert "Traceback" not in server.said
        assert "failed" not in server.said


def test_signals_to_the_engine_are_the_servers(demo, start):
    """A terminal's Ctrl-C, and a service manager's SIGTERM, reach both processes."""
    with start(demo) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(server.engine, number)
        assert httpx.post(f"{server.url}/completions", json={**LONG, "max_tokens": 3}).status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is not a bundle"),
        (["{demo}", "--host", "203.0.113.7"], "cannot be had"),
        (["{demo}", "--ssl-keyfile", "{demo}/config.json"], "--ssl-certfile"),
        (["{demo}", "--ssl-certfile", "{demo}/config.json"], "no certificate"),
        (["{demo}", "--tool-parser", "hermes"], "must be one of"),
        (["{demo}", "--api-key", "a b\x07"], "printable"),
        (["{demo}", "--api-key-file", "{empty}"], "holds no key"),
        (["{demo}", "--api-key-file", "/dev/null"], "no regular file"),
        (["{demo}", "--pages", "2"], "a cache of 2 pages"),
    ],
)
def test_what_cannot_be_served_is_said(demo, tmp_path, arguments, words):
    (tmp_path / "empty").touch()
    given = [argument.format(demo=demo, empty=tmp_path / "empty") for argument in arguments]
    code = f"from deepseek_trt.cli.main import main; main({['serve', *given, '--port', '0']!r})"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert made.returncode == 1
    assert words in made.stderr
    assert "Traceback" not in made.stderr


def test_a_taken_port_is_said_before_anything_is_loaded(demo, server):
    port = server.root.rpartition(":")[2]
    code = f"from deepseek_trt.cli.main import main; main({['serve', str(demo), '--port', port]!r})"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert made.returncode == 1
    assert f"port {port}: cannot be had" in made.stderr


def test_https_and_json_for_machines(demo, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    arguments = [
        "serve",
        str(demo),
        "--port",
        "0",
        "--json",
        "--ssl-certfile",
        str(certificate),
        "--ssl-keyfile",
        str(key),
    ]
    code = f"from deepseek_trt.cli.main import main; main({arguments!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            facts = json.loads(process.stdout.readline())
            assert facts["url"].startswith("https://127.0.0.1:")
            trusted = ssl.create_default_context(cafile=certificate)
            answer = httpx.post(f"{facts['url']}/completions", json={**LONG, "max_tokens": 3}, verify=trusted)
            assert answer.json()["model"] == facts["models"][0]
        finally:
            process.terminate()
    assert process.returncode == 0


def test_probes_say_what_is_so(demo, start, until):
    """One slot and a queue of one: full is not ready, and alive."""
    with start(demo, "--max-inflight", "2", "--max-running", "1") as server:

        def probe(which):
            return httpx.get(f"{server.root}/health/{which}", timeout=60).status_code

        body = {**LONG, "stream": True}
        until(lambda: probe("ready") == 200)
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{server.url}/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with client.stream("POST", f"{server.url}/completions", json=body):
                until(lambda: server.metrics()["queued_requests"] == 1)
                values = server.metrics()
                assert values["running_requests"] == 1
                assert 0 < values["cache_usage_ratio"] <= 1
                until(lambda: probe("ready") == 503)
                assert probe("live") == 200
                assert httpx.get(f"{server.root}/health").status_code == 200
            until(lambda: probe("ready") == 200)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: probe("ready") == 503)
            assert probe("live") == 200
        assert server.wait() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_that_stands_still_ends_the_server(demo, start, busy):
    with start(demo, "--stall-seconds", "3") as server:
        body = {**LONG, "stream": True}
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{server.url}/completions", json=body) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            if not busy:
                answer.close()
            os.kill(server.engine, signal.SIGSTOP)
            rest = [line for line in lines if line] if busy else []
        assert not busy or '"error"' in rest[-2]
        assert server.wait() == 1
        assert "the engine stands still: it has made no step for 3 s (killed by signal 9)" in server.said
        assert "Traceback" not in server.said


def test_an_idle_engine_is_no_fault(demo, start, until):
    with start(demo, "--stall-seconds", "1.5") as server:
        beats = server.metrics()["heartbeats_total"]
        until(lambda: server.metrics()["heartbeats_total"] > beats + 4)
        assert httpx.get(f"{server.root}/health/live").status_code == 200
        assert server.stop() == 0
