"""A repository's serve.sh, its tritonserver and its model's process, killed at random times.

Nothing stays but what the next start removes, and that answers as ever.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepseek_trt.cli.main import main


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kills = sys.modules.get("kills") or _load("kills")

FEW, MANY = 2, 50
VENV = Path(__file__).parents[2] / ".venv-server"
MODEL = "/v2/models/deepseek_v2"
ANSWER = {"text_input": "The number", "max_tokens": 12}
LONG = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000, "stream": True}
WORDS = {"server": "/bin/tritonserver", "model": "triton_python_backend_stub"}  # of their command lines


class Repository:
    """One serve.sh after the other, over one repository, in one place."""

    def __init__(self, place, folder):
        self.place, self.folder = place, folder
        self._started = []  # process ids, which names of shared memory hold
        ports = f"--http-port={place.port}", f"--grpc-port={kills.free_port()}", f"--metrics-port={kills.free_port()}"
        self._command = ["bash", str(folder / "serve.sh"), *ports, f"--control-file={place.folder / 'control'}"]

    def start(self):
        path = f"{VENV / 'bin'}:{self.place.environment['PATH']}"
        self.process = self.place.start(self._command, PATH=path, PYTHONPATH="")
        self._started.append(self.process.pid)

    def shared_memory(self):
        return [file for pid in self._started for file in Path("/dev/shm").glob(f"deepseek_trt_{pid}_*")]

    def ready(self):
        assert self.ends_or_answers(), self.place.said()[-8000:]

    def ends_or_answers(self):
        """Whether it is there; False where it has ended. It crashes where it is asked about models before it is up."""
        kills.wait_until(lambda: self.process.poll() is not None or self._answers(), self.place.said)
        return self.process.poll() is None

    def _answers(self):
        if not self.place.is_ready("/v2/health/ready") or not self.place.is_ready(f"{MODEL}/ready"):
            return False
        try:
            return self.place.ask("POST", f"{MODEL}/generate", ANSWER)[0] == 200
        except (OSError, kills.http.client.HTTPException):
            return False

    def answer(self):
        status, body = self.place.ask("POST", f"{MODEL}/generate", ANSWER)
        assert status == 200, body
        return body["text_output"], body["num_output_tokens"]

    def clients(self):
        return kills.Clients(self.place, f"{MODEL}/generate_stream", [LONG, LONG, {**LONG, "max_tokens": 2040}])

    def victim(self, name):
        """A process id, once there is one; None where the supervisor has ended before."""
        if name == "supervisor":
            return self.process.pid
        found: list[int | None] = []

        def looked():
            found.append(self._victim(name))
            return found[-1] or self.process.poll() is not None

        kills.wait_until(looked, self.place.said)
        return found[-1]

    def _victim(self, name):
        return kills.descendant(self.process.pid, WORDS[name])

    def end(self):
        """In order, or as it has ended already; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(kills.WAIT)


@pytest.fixture
def served(demo_checkpoint, bundle_of, tmp_path):
    if not (VENV / "bin" / "python").is_file():
        pytest.skip(f"there is no {VENV.name}: make it with scripts/server-env")
    folder = tmp_path / "repository"
    arguments = ["model-repository", bundle_of(demo_checkpoint).path, folder, "--threads", 1, "--backend", "ort"]
    made = CliRunner().invoke(main, list(map(str, arguments)))
    assert made.exit_code == 0, made.output
    place = kills.Place(tmp_path / "place")
    yield Repository(place, folder)
    place.end()


def kill(served, victim, when, share, start_seconds, wanted):
    """Start, and kill at that moment; gives the clients. A server that is to work must answer as `wanted`."""
    served.start()
    clients = None
    if when == "starting":
        served.victim(victim)
        time.sleep(share * start_seconds)
    else:
        served.ready()
        assert served.answer() == wanted
        clients = served.clients()
        if when == "draining":
            served.process.send_signal(signal.SIGTERM)
        time.sleep(share)
    target = served.victim(victim)
    if target is not None:
        os.kill(target, signal.SIGKILL)
    if victim == "supervisor":
        assert served.process.wait(kills.WAIT) == -signal.SIGKILL
    return clients


@pytest.mark.parametrize(
    ("victim", "times"),
    [pytest.param("supervisor", FEW), *(pytest.param(v, MANY, marks=pytest.mark.slow) for v in ("supervisor", *WORDS))],
)
def test_kills_of_a_repositorys_server(served, contents, victim, times):
    """A killed supervisor's server ends; a killed server or model comes back, or serve.sh ends and says so."""
    before = contents(served.folder)
    served.start()
    began = time.monotonic()
    served.ready()
    start_seconds, wanted = time.monotonic() - began, served.answer()
    assert served.end() == 0, served.place.said()[-8000:]
    served.place.wait_until_empty()
    assert not served.shared_memory()
    files, ends = served.place.files(), []
    for when, share in kills.moments(times, victim):
        clients = kill(served, victim, when, share, start_seconds, wanted)
        if victim != "supervisor":
            if served.ends_or_answers():
                assert served.answer() == wanted
            ends.append(served.end())
        if clients:
            clients.join()
        served.place.wait_until_empty()
        print(victim, when, f"{share:.2f}", f"{served.place.seconds[-1]:.1f} s", flush=True)
    served.start()
    served.ready()
    assert served.answer() == wanted
    assert served.end() == 0
    served.place.wait_until_empty()
    assert served.place.files() == files
    assert not served.shared_memory()
    assert contents(served.folder) == before
    seconds, codes = max(served.place.seconds), {code: ends.count(code) for code in ends}
    print(f"{victim}: {times} kills, at most {seconds:.1f} s until all had ended; exit codes {codes}")


def test_a_model_that_is_killed_at_each_load_ends_the_server(served):
    """As where there is too little memory for it: no start after the third."""
    served.start()
    model, killed = f"{served.folder / 'deepseek_v2'}/", []

    def kill_another():
        """Whether there was one: a look at what runs is of one moment, and may miss what is there."""
        pid = kills.descendant(served.process.pid, model)
        if pid is None or pid in killed:
            return False
        killed.append(pid)
        os.kill(pid, signal.SIGKILL)
        return True

    for _ in range(3):
        kills.wait_until(kill_another, served.place.said)
    assert served.process.wait(kills.WAIT) == 1
    assert "was killed while it loaded, at each of 3 starts: ending" in served.place.said()
    served.place.wait_until_empty()
