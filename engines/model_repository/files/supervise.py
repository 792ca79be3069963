"""Runs tritonserver over the models of this folder; serve.sh starts it. Standard library alone.

It does what tritonserver 2.51 does not by itself:
- SIGTERM or SIGINT first unloads the models, so that every stream ends before the server waits for its connections;
- a model whose process died, or that unloaded itself because its engine failed, is loaded again.
"""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

Flags = dict[str, list[str | None]]

REPOSITORY = Path(__file__).resolve().parent
WATCH_SECONDS = 0.5
RELOAD_SECONDS = 10  # between two tries to load a model again
# Overridden by the same flags given to serve.sh.
DEFAULTS = {
    "model-repository": str(REPOSITORY),
    "model-control-mode": "explicit",
    "http-address": "127.0.0.1",
    "grpc-address": "127.0.0.1",
    "metrics-address": "127.0.0.1",
    "http-port": "8000",
    "grpc-port": "8001",
    "metrics-port": "8002",
    "exit-timeout-secs": "30",
    "pinned-memory-pool-byte-size": "0",
    "allow-gpu-metrics": "false",
}


def say(message: str) -> None:
    print(f"serve.sh: {message}", file=sys.stderr, flush=True)


def split_flags(arguments: list[str]) -> tuple[Flags, str]:
    """Flags as lists of values by name, in order, and the server's path; `--flag value` and `--flag=value` are one."""
    flags, rest = {}, list(arguments)
    while rest:
        name, given, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            sys.exit(f"serve.sh: {name!r} is no flag: see {Path(__file__).with_name('serve.sh')}")
        if not given and rest and not rest[0].startswith("--"):
            value, given = rest.pop(0), "="
        flags.setdefault(name[2:], []).append(value if given else None)
    server = (flags.pop("tritonserver", None) or [os.environ.get("TRITONSERVER", "tritonserver")])[-1]
    return flags, server


def command_of(server: str, flags: Flags, models: list[str]) -> list[str]:
    """The server's command line: what was given, the defaults for the rest."""
    found = shutil.which(server)
    if not found:
        sys.exit(f"serve.sh: there is no {server}: give --tritonserver=PATH, or set TRITONSERVER")
    chosen = {**{name: [value] for name, value in DEFAULTS.items()}, **flags}
    chosen.setdefault("disable-auto-complete-config", [None])
    if chosen["model-control-mode"] == ["explicit"]:
        chosen.setdefault("load-model", list(models))
    given = [f"--{name}" if value is None else f"--{name}={value}" for name in chosen for value in chosen[name]]
    return [found, *given]


def find_models() -> list[str]:
    """Their names; a folder that tritonserver 2.51 would hang on is refused here."""
    names = sorted(config.parent.name for config in REPOSITORY.glob("[!.]*/config.pbtxt"))
    for name in names:
        if not (REPOSITORY / name / "1" / "model.py").is_file():
            sys.exit(f"serve.sh: {REPOSITORY / name / '1' / 'model.py'} is missing: write the repository again")
    return names or sys.exit(f"serve.sh: there is no model in {REPOSITORY}")


class Supervisor:
    """One server from start to end."""

    def __init__(self, server: str, flags: Flags, models: list[str]) -> None:
        self.models = models
        self.command = command_of(server, flags, models)
        value = {name: (flags.get(name) or [default])[-1] for name, default in DEFAULTS.items()}
        address = value["http-address"]
        self.address = "127.0.0.1" if address == "0.0.0.0" else address
        self.port = int(value["http-port"])
        self.explicit = value["model-control-mode"] == "explicit"
        self.exit_seconds = float(value["exit-timeout-secs"])
        self.stopping = False
        self.stubs: dict[str, int] = {}  # model: pid of the process that holds it
        self.retry_at: dict[str, float] = {}  # model: when it may be loaded again

    def run(self) -> int:
        """The server's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)
        self.server = subprocess.Popen(self.command)
        while self.server.poll() is None and not self.stopping:
            self.watch()
            self.pause(WATCH_SECONDS)
        if self.stopping and self.server.poll() is None:
            self.stop()
        code = self.server.wait()
        return 128 - code if code < 0 else code

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stopping and self.server.poll() is None:
            time.sleep(0.05)

    def stop(self) -> None:
        """Unload all models at once, then end the server."""
        say("unloading the models")
        if self.explicit:
            for model in self.models:
                self.post(f"/v2/repository/models/{model}/unload", timeout=self.exit_seconds)
        deadline = time.monotonic() + self.exit_seconds
        while time.monotonic() < deadline and self.server.poll() is None and self.stub_pids():
            time.sleep(0.05)
        say("ending the server")
        self.server.terminate()
        try:
            self.server.wait(self.exit_seconds + 5)
        except subprocess.TimeoutExpired:
            say("the server does not end: killing it")
            self.server.kill()

    def watch(self) -> None:
        """Load again what has died."""
        if not self.explicit:
            return
        found = self.stub_pids()
        for model, pid in found.items():
            self.stubs[model] = pid
        for model in set(self.stubs) - set(found):
            if time.monotonic() >= self.retry_at.get(model, 0):
                self.retry_at[model] = time.monotonic() + RELOAD_SECONDS
                say(f"the process of {model} is gone: loading the model again")
                self.post(f"/v2/repository/models/{model}/unload", timeout=30)
                self.post(f"/v2/repository/models/{model}/load", timeout=600)

    def stub_pids(self) -> dict[str, int]:
        """Running processes of the Python backend by model; a killed one that is not reaped yet counts as gone."""
        pids: dict[str, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(status[1]) != self.server.pid or status[0] == "Z" or len(words) < 2:
                continue
            for model in self.models:
                if words[1].decode(errors="replace").startswith(f"{REPOSITORY / model}/"):
                    pids[model] = int(entry.name)
        return pids

    def post(self, path: str, timeout: float) -> int | None:
        """The status, or None where the server does not answer."""
        try:
            connection = http.client.HTTPConnection(self.address, self.port, timeout=timeout)
            connection.request("POST", path, body=b"{}")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                say(f"{path}: {answer.status} {body[:500].decode(errors='replace')}")
            return answer.status
        except (OSError, http.client.HTTPException) as error:
            say(f"{path}: {error}")
            return None


if __name__ == "__main__":
    given_flags, tritonserver = split_flags(sys.argv[1:])
    sys.exit(Supervisor(tritonserver, given_flags, find_models()).run())
