"""A served repository on loopback: started through its own serve.sh, watched until ready, ended without leavings.

Standard library alone: tests and benchmarks load this file, and its HTTP client is their client.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-server"
PYTHON = VENV / "bin" / "python"
MODEL = "deepseek_v2"
_SAMPLE = re.compile(r"^(\w+?)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; `json` is its body, or the body's text under "text" where it is no JSON."""

    status: int
    json: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One line of /metrics."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass
class Server:
    """One tritonserver over `repository`, started by its serve.sh with `flags` after the script's own."""

    repository: Path
    folder: Path
    flags: tuple[str, ...] = ()
    models: tuple[str, ...] = (MODEL,)
    environment: dict[str, str] = field(default_factory=dict)
    ready_timeout: float = 60.0
    exit_timeout: float = 30.0

    def start(self) -> Server:
        """Returns once all models are ready; RuntimeError with the log's end when the server ends or hangs before."""
        self.spawn()
        deadline = time.monotonic() + self.ready_timeout
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server is not ready ({self.process.returncode}):\n{self.log_tail()}")
            time.sleep(0.05)
        return self

    def spawn(self) -> None:
        """Start the process and return at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.http, self.grpc, self.metrics_port = free_ports(3)
        self.shared = f"t{os.getpid()}_{self.http}_"
        self.log_file = self.folder / f"server-{self.http}.log"
        self.control_file = self.folder / f"control-{self.http}"
        names = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"PATH": f"{VENV / 'bin'}:{environment['PATH']}", **self.environment}
        command = [
            "bash",
            str(self.repository / "serve.sh"),
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics_port}",
            f"--control-file={self.control_file}",
            f"--backend-config=python,shm-region-prefix-name={self.shared}",
            *self.flags,
        ]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ready(self) -> bool:
        """Whether all models are, and the metrics are served.

        The server is asked first: 2.51 crashes when it is asked about models before it is up.
        """
        try:
            if self.get("/v2/health/ready").status != 200:
                return False
            self.metrics()  # served from some 50 ms after the rest
            return all(self.get(f"/v2/models/{model}/ready").status == 200 for model in self.models)
        except (OSError, http.client.HTTPException):
            return False

    def stop(self) -> int:
        """SIGTERM, as an orchestrator does it; the exit code. `left` is what it leaves of shared memory."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(self.exit_timeout)
        finally:
            self.left = self.shared_memory()
            self.kill()

    def kill(self) -> None:
        """End the whole group (stubs outlive a crashed server) and unlink what shared memory that leaves."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in self.shared_memory():
            file.unlink(missing_ok=True)

    def shared_memory(self) -> list[Path]:
        return sorted(Path("/dev/shm").glob(f"{self.shared}*"))

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        """The log's end without the tables of the start."""
        kept = [line for line in self.log().splitlines() if line[:1] not in "|+"]
        return "\n".join(kept[-lines:])

    def stub_pids(self, model: str = MODEL) -> list[int]:
        """Processes of the Python backend that hold `model`."""
        return [pid for pid in descendants(self.process.pid) if _is_stub(pid, model)]

    def server_pid(self) -> int:
        """tritonserver itself, below serve.sh."""
        together = [self.process.pid, *descendants(self.process.pid)]
        return next(pid for pid in together if _command(pid)[:1] and _command(pid)[0].endswith("/bin/tritonserver"))

    def pids(self) -> list[int]:
        """The server and the model's process."""
        return [self.server_pid(), *self.stub_pids()]

    # HTTP

    def get(self, path: str) -> Reply:
        return self._call("GET", path, None)

    def post(self, path: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> Reply:
        return self._call("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)

    def control(self) -> dict[str, str]:
        """The header that control endpoints ask for."""
        name, _, key = self.control_file.read_text().strip().partition(": ")
        return {name: key}

    def manage(self, verb: str, model: str = MODEL) -> Reply:
        """Load or unload a model by the server's own API."""
        return self.post(f"/v2/repository/models/{model}/{verb}", {}, self.control())

    def generate(self, model: str = MODEL, /, **inputs: Any) -> Reply:
        return self.post(f"/v2/models/{model}/generate", inputs)

    def load(self, model: str = MODEL) -> Reply:
        """Load the model anew, in a process of its own, by the server's API."""
        return self.manage("load", model)

    def stream(self, model: str = MODEL, /, **inputs: Any) -> Iterator[dict[str, Any]]:
        """Events of generate_stream as they come; closing the iterator closes the connection."""
        with contextlib.closing(self._connection()) as connection:
            body = json.dumps({"stream": True, **inputs})
            connection.request("POST", f"/v2/models/{model}/generate_stream", body)
            yield from events_of(connection.getresponse())

    def metrics(self) -> list[Sample]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        found = (_SAMPLE.match(line) for line in lines if not line.startswith("#"))
        return [Sample(m[1], dict(_LABEL.findall(m[2] or "")), float(m[3])) for m in found if m]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of `name` over all samples that have these labels."""
        return sum(s.value for s in self.metrics() if s.name == name and labels.items() <= s.labels.items())

    def wait_for(self, what: Callable[[], bool], seconds: float = 30.0) -> bool:
        """Whether `what` comes true while the server lives."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if what():
                return True
            time.sleep(0.01)
        return False

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.http, timeout=60)

    def _call(self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> Reply:
        with contextlib.closing(self._connection()) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        try:
            return Reply(response.status, json.loads(text or "{}"))
        except ValueError:
            return Reply(response.status, {"text": text})


def events_of(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events, each as its JSON; an answer that is an error is one event {"error": ...}."""
    for line in response:
        text = line.decode().strip()
        if text:
            yield json.loads(text.removeprefix("data: "))


def joined(events: list[dict[str, Any]]) -> str:
    """The text of a stream."""
    return "".join(event.get("text_output", "") for event in events)


def run_grpc(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """grpc_calls.py's answers to `job`."""
    script = Path(__file__).with_name("grpc_calls.py")
    environment = {"PATH": os.environ["PATH"]}
    result = subprocess.run(
        [str(PYTHON), str(script)],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    answers: list[list[dict[str, Any]]] = json.loads(result.stdout)
    return answers


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def descendants(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _is_stub(pid: int, model: str) -> bool:
    command = _command(pid)
    return "triton_python_backend_stub" in command[0] and f"/{model}/" in command[1] if len(command) > 1 else False
