"""A real `deepseek-trt serve` with the model that ships with the package, on a free port of the loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

import deepseek_trt

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

_SLOW = """
_decode = OrtSession.decode
def _slow(*inputs):
    __import__("time").sleep(0.005)
    return _decode(*inputs)
OrtSession.decode = _slow
"""
WAIT = 60.0  # seconds before a test that waits gives up


class Running:
    """A server's process, where it is, and what it says."""

    def __init__(self, *arguments: object, package: Path | None = None) -> None:
        command = ["serve", *map(str, arguments), "--port", "0"]
        code = f"from deepseek_trt.cli.main import main; main({command!r})"
        if package:
            code = f"import sys; sys.path.insert(0, {str(package)!r}); {code}"
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        assert self._serving.wait(WAIT), self.said
        self.url = next((line.split()[-1] for line in self.lines if line.startswith("serving ")), "")

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def engine(self) -> int:
        """The engine's process id."""
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def metrics(self) -> dict[str, float]:
        """Values by name and label, e.g. requests_total{ok}."""
        values = {}
        for line in httpx.get(f"{self.root}/metrics").text.splitlines():
            if line.startswith("deepseek_trt_"):
                name, _, rest = line.removeprefix("deepseek_trt_").partition("{")
                labels, _, value = rest.rpartition("} ")
                label = labels.partition(",")[2].partition('"')[2].rstrip('"')
                values[f"{name}{{{label}}}" if label else name] = float(value)
        return values

    def stop(self, how: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(WAIT)
        self._thread.join(WAIT)
        self.process.stderr.close()
        return code

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(("serving ", "error")):
                self._serving.set()
        self._serving.set()


def wait_until(holds) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def running(*arguments: object, package: Path | None = None):
    """A server for one test, which may end it itself. package: the folder to import deepseek_trt from."""
    server = Running(*arguments, package=package)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            with suppress(OSError, ValueError):  # one that is stopped would hold the pipes
                os.kill(server.engine, signal.SIGKILL)
            server.process.kill()
            server.wait()


@pytest.fixture(scope="session")
def demo(demo_checkpoint, bundle_of) -> Path:
    return bundle_of(demo_checkpoint).path


@pytest.fixture(scope="session")
def server(demo):
    """One for all tests that leave it as it was."""
    with running(demo, "--served-model-name", "demo", "--served-model-name", "again") as server:
        yield server
        assert server.stop() == 0, server.said
        assert "Traceback" not in server.said


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.root, timeout=WAIT) as client:
        yield client


@pytest.fixture(scope="session")
def slow_package(tmp_path_factory) -> Path:
    """To import a deepseek_trt from whose steps take 5 ms: no answer ends while a busy machine stands still."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(Path(deepseek_trt.__file__).parent, folder / "deepseek_trt")
    with (folder / "deepseek_trt" / "engines" / "sessions" / "ort.py").open("a") as file:
        file.write(_SLOW)
    return folder


@pytest.fixture
def start(slow_package):
    """`running` with slow steps, for tests that end their servers."""
    return partial(running, package=slow_package)


@pytest.fixture
def until():
    return wait_until


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]


@pytest.fixture
def alive():
    return is_alive
