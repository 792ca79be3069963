"""deepseek-trt serve, killed at random times: all its processes end, and the next start cleans up and answers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kills = sys.modules.get("kills") or _load("kills")

FEW, MANY = 3, 50
ANSWER = {"prompt": "The number", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "Return", "max_tokens": 2000, "ignore_eos": True, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "Return"}], "max_tokens": 500, "stream": True}


class Serve:
    """One `serve` after the other, over one bundle, in one place."""

    def __init__(self, place, bundle):
        self.place = place
        self._command = kills.program("serve", bundle, "--port", place.port, "--drain-seconds", 30)

    def start(self):
        self.process = self.place.start(self._command)

    def ready(self):
        kills.wait_until(lambda: self.process.poll() is not None or self.place.is_ready("/health/ready"))
        assert self.process.poll() is None, self.place.said()

    def answer(self):
        status, body = self.place.ask("POST", "/v1/completions", ANSWER)
        assert status == 200, body
        return body["choices"][0]["text"], body["usage"]

    def clients(self):
        return kills.Clients(self.place, "/v1/completions", [LONG, LONG, {**LONG, "stream": False, "max_tokens": 300}])

    def engine(self):
        """The engine's process id, once there is one; None where the server has ended before."""
        kills.wait_until(lambda: self._engine() or self.process.poll() is not None)
        return self._engine()

    def _engine(self):
        return kills.descendant(self.process.pid, "serving.process.engine")


@pytest.fixture
def served(demo_checkpoint, bundle_of, tmp_path):
    bundle = Path(shutil.copytree(bundle_of(demo_checkpoint).path, tmp_path / "bundle"))
    place = kills.Place(tmp_path / "place")
    yield Serve(place, bundle), bundle
    place.end()


def kill(served, victim, when, share, start_seconds, wanted):
    """Start, and kill at that moment; gives the exit code. A server that is to work must answer as `wanted`."""
    served.start()
    if when == "starting":
        if victim == "engine":
            served.engine()
        time.sleep(share * start_seconds)
        clients = None
    else:
        served.ready()
        assert served.answer() == wanted
        clients = served.clients()
        if when == "draining":
            served.process.send_signal(signal.SIGTERM)
        time.sleep(share)
    target = served.process.pid if victim == "server" else served.engine()
    if target is not None:
        os.kill(target, signal.SIGKILL)
    code = served.process.wait(kills.WAIT)
    if clients:
        clients.join()
    return code


@pytest.mark.parametrize("times", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", ["server", "engine"])
def test_kills_of_serve(served, contents, victim, times):
    serve, bundle = served
    before = contents(bundle)
    serve.start()
    began = time.monotonic()
    serve.ready()
    start_seconds, wanted = time.monotonic() - began, serve.answer()
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(kills.WAIT) == 0
    files = serve.place.files()
    codes = {}
    for when, share in kills.moments(times, victim):
        code = kill(serve, victim, when, share, start_seconds, wanted)
        codes[code] = codes.get(code, 0) + 1
        assert code == (-signal.SIGKILL if victim == "server" else 1), (when, share, serve.place.said()[-4000:])
        serve.place.wait_until_empty()
        print(victim, when, f"{share:.2f}", f"{serve.place.seconds[-1]:.1f} s", flush=True)
    serve.start()
    serve.ready()
    assert serve.answer() == wanted
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(kills.WAIT) == 0, serve.place.said()[-4000:]
    serve.place.wait_until_empty()
    assert serve.place.files() == files
    assert contents(bundle) == before
    assert "Traceback" not in serve.place.said()
    print(f"{victim}: {times} kills, at most {max(serve.place.seconds):.1f} s until all had ended; exit codes {codes}")
