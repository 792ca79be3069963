"""Runs tritonserver over the models of this folder; serve.sh starts it. Standard library alone.

It does what tritonserver 2.51 does not by itself:
- SIGTERM or SIGINT first unloads the models, so that every stream ends before the server waits for its connections;
- when a model's process was killed, the server is started again: it would say that the model is ready, answer nothing,
  and leave those who wait for an answer waiting for ever. Other models' streams may end first;
- when the server itself has crashed, it is started again, unless it crashes over and over;
- when a model's engine stands still, or the server does not answer, for --stall-seconds, it is started again, too;
- `--probe-port=PORT` (of `--probe-address`, 127.0.0.1 unless given) answers /health/live and /health/ready, by what is
  known here: no probe is a request to a model, and none waits for one;
- no process and no shared memory stays behind: the server dies with this process even where that is killed, and
  shared memory that then is left goes with the next start;
- who reaches a port can infer and read what the models and metrics are, and no more: what loads models (which runs
  code), maps shared memory or writes files asks for a header that is made anew at each start. `--control-file=FILE`
  keeps it in FILE, or takes it from there. Given --http-restricted-api and --grpc-restricted-protocol stand before it.
A model that unloaded itself, because its engine failed, stays unloaded: the server says that it is not ready.
"""

import http.client
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parent
sys.dont_write_bytecode = True  # __pycache__ in this folder would look like a model
sys.path.insert(0, str(REPOSITORY))

from control import control_key, hide_argument, restrict  # noqa: E402
from flags import (  # noqa: E402
    DEFAULTS,
    Flags,
    command_of,
    own_shared_memory,
    reachable,
    say,
    split_flags,
    take_number,
    take_probe,
)
from heart import STALL_SECONDS, cpu_seconds  # noqa: E402
from leavings import SharedMemory, bound, clear_leavings, guard  # noqa: E402
from probes import Health, Pulses, pulses, serve_probes  # noqa: E402

WATCH_SECONDS = 0.5
ASK_SECONDS = 2.0  # for an answer about health
LOOKS = 2  # a model that is being unloaded has no process before the server says so
CRASHES, CRASH_SECONDS = 3, 60  # so many crashes in this time are too many
STARTS = 3  # and so many starts in a row before the server was ready once
HIDE_SECONDS = 10.0  # how long a server may take from its start to its first thread


def find_models() -> list[str]:
    """Their names; a folder that tritonserver 2.51 would hang on is refused here."""
    names = sorted(config.parent.name for config in REPOSITORY.glob("[!.]*/config.pbtxt"))
    for name in names:
        if not (REPOSITORY / name / "1" / "model.py").is_file():
            sys.exit(f"serve.sh: {REPOSITORY / name / '1' / 'model.py'} is missing: write the repository again")
    return names or sys.exit(f"serve.sh: there is no model in {REPOSITORY}")


class Supervisor:
    """The server from start to end, through restarts."""

    def __init__(self, server: str, flags: Flags, models: list[str]) -> None:
        self.models = models
        self.health = Health(take_number(flags, "stall-seconds", 1, 86400, STALL_SECONDS))
        probe_port, probe_address = take_probe(flags)
        self.memory = SharedMemory(own_shared_memory(flags))
        self.key = control_key((flags.pop("control-file", None) or [None])[-1])
        self.headers = restrict(flags, self.key)
        self.command = command_of(server, flags, models)
        value = {name: (flags.get(name) or [default])[-1] or "" for name, default in DEFAULTS.items()}
        self.address, self.port = reachable(value["http-address"]), int(value["http-port"])
        self.metrics = reachable(value["metrics-address"]), int(value["metrics-port"])
        self.explicit = value["model-control-mode"] == "explicit"
        self.exit_seconds = float(value["exit-timeout-secs"])
        self.stopping = False
        self.crashes: list[float] = []  # when
        self.starts = 0  # since the server was last ready
        self.stubs: dict[str, int] = {}  # model: pid of the process that holds it
        self.looks: dict[str, int] = {}  # model: looks in a row that found no process
        self.hidden, self.looked, self.dead = False, time.monotonic(), 0
        if probe_port:
            serve_probes(probe_address, probe_port, self.why_not)

    def run(self) -> int:
        """The server's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)
        clear_leavings()
        self.memory.clear()
        self.start()
        try:
            while not self.stopping and (self.server.poll() is None or self.recovers()):
                self.look()
                reason = self.reason_to_restart()
                if reason and self.starts >= STARTS:
                    say(
                        f"{reason}, at each of {self.starts} starts: ending; see the log above, and the memory there is"
                    )
                    return 1
                if reason and not self.stopping:
                    say(f"{reason}: starting the server again")
                    self.restart()
                self.pause(WATCH_SECONDS)
            if self.server.poll() is None:
                self.stop()
            code = self.server.wait()
            return 128 - code if code < 0 else code
        finally:
            self.clear()
            self.memory.release()

    def start(self) -> None:
        self.starts += 1
        self.server = subprocess.Popen(bound(self.command), start_new_session=True)
        self.guard = guard(self.server.pid)
        self.hidden, self.hide_until = False, time.monotonic() + HIDE_SECONDS

    def recovers(self) -> bool:
        """Whether the server, which has ended, was started again: only where a signal ended it."""
        now = time.monotonic()
        self.crashes = [crash for crash in self.crashes if now - crash < CRASH_SECONDS] + [now]
        if self.server.returncode >= 0 or len(self.crashes) >= CRASHES:
            return False
        say(f"the server has crashed (signal {-self.server.returncode}): starting it again")
        self.restart()
        return True

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stopping and self.server.poll() is None:
            self.hide()
            time.sleep(0.05 if self.hidden else 0.002)

    def hide(self) -> None:
        """Take the key out of the server's command line, which any user of the machine can read, once it is read."""
        if not self.hidden:
            late = time.monotonic() > self.hide_until
            self.hidden = hide_argument(self.server.pid, self.key) or late
            if late:
                say("the key of the control endpoints can be seen in the server's command line: keep others off /proc")

    def killed(self) -> list[str]:
        """At most one model that has had no process for some looks while the server did not deny that it is ready."""
        found = self.known_stubs()
        if len(found) < len(self.models):  # reading all of /proc each time would cost a percent of a processor
            found = self.stub_pids()
        self.stubs = found
        believed = [model for model in self.models if model not in found and self.believes(model)]
        self.looks = {model: self.looks.get(model, 0) + 1 for model in believed}
        return [model for model, looks in self.looks.items() if looks >= LOOKS][:1]

    def waits_for_the_dead(self) -> bool:
        """Whether a child of a server that is not up yet has been dead for some looks: 2.51 waits for it for ever."""
        self.dead = self.dead + 1 if not self.health.up and has_dead_child(self.server.pid) else 0
        return self.dead >= LOOKS

    def known_stubs(self) -> dict[str, int]:
        """Processes that were found earlier and hold their models still."""
        return {model: pid for model, pid in self.stubs.items() if is_stub(pid, self.models) == model}

    def look(self) -> None:
        """Note what the server and the hearts of its models say."""
        pids = {"": self.server.pid, **self.known_stubs()}
        status = self.ask("GET", "/v2/health/ready", ASK_SECONDS)
        beating = self.read_pulses() if status else {}
        now = time.monotonic()
        self.starts = 0 if status == 200 else self.starts
        self.health.look(status, beating, {name: cpu_seconds(pid) for name, pid in pids.items()}, now - self.looked)
        self.looked = now

    def read_pulses(self) -> Pulses:
        try:
            connection = http.client.HTTPConnection(*self.metrics, timeout=ASK_SECONDS)
            connection.request("GET", "/metrics")
            return pulses(connection.getresponse().read().decode())
        except (OSError, ValueError, http.client.HTTPException):
            return {}

    def reason_to_restart(self) -> str:
        """What can be mended by a new start of the server alone, or nothing."""
        for model in self.killed():
            return f"the process of {model} was killed"
        if self.waits_for_the_dead():
            return "a model's process was killed while it loaded"
        seconds = f"{self.health.stall_seconds:g} s"
        if self.health.server.stopped:
            return f"the server has not answered for {seconds}"
        for model in self.health.stopped():
            pid = self.known_stubs().get(model)
            if pid and self.believes(model):
                os.kill(pid, signal.SIGKILL)  # it would not unload
                return f"the engine of {model} stands still: it has made no step for {seconds}"
        return ""

    def why_not(self, kind: str) -> str:
        """For a probe: what is wrong, or nothing."""
        return "the server is ending" if self.stopping and kind == "ready" else self.health.why_not(kind)

    def believes(self, model: str) -> bool:
        """Whether the server, once it is up, says that the model is ready, or says nothing: 2.51 can hang then."""
        return self.health.up and self.ask("GET", f"/v2/models/{model}/ready") in (200, None)

    def restart(self) -> None:
        hangs = self.health.server.stopped or not self.health.up
        self.health.reset()  # a probe learns it now
        if self.server.poll() is None:
            if not hangs:
                self.unload()
            self.server.kill()
        self.server.wait()
        self.clear()
        if not self.stopping:
            self.start()

    def stop(self) -> None:
        self.unload()
        say("ending the server")
        self.server.terminate()
        try:
            self.server.wait(self.exit_seconds + 5)
        except subprocess.TimeoutExpired:
            say("the server does not end: killing it")
            self.server.kill()

    def unload(self) -> None:
        """Let all models end their streams, all at once; returns when they are gone."""
        say("unloading the models")
        for model in self.models if self.explicit else ():
            status = self.ask("POST", f"/v2/repository/models/{model}/unload")
            if status != 200:
                say(f"{model} is not unloaded: {status or 'no answer'}")
        deadline = time.monotonic() + self.exit_seconds
        while self.explicit and time.monotonic() < deadline and self.server.poll() is None and self.stub_pids():
            time.sleep(0.05)

    def clear(self) -> None:
        """What a killed server leaves: processes of models, and shared memory."""
        self.guard.communicate()
        for pid in self.stubs.values():
            if is_stub(pid, self.models):
                os.kill(pid, signal.SIGKILL)
        self.stubs, self.looks = {}, {}
        self.health.reset()
        self.memory.clear()

    def stub_pids(self) -> dict[str, int]:
        """Running processes of the Python backend by model."""
        children = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = {pid: is_stub(pid, self.models, self.server.pid) for pid in children}
        return {model: pid for pid, model in found.items() if model}

    def ask(self, method: str, path: str, seconds: float = 5.0) -> int | None:
        """The status, or None where the server does not answer."""
        try:
            connection = http.client.HTTPConnection(self.address, self.port, timeout=seconds)
            connection.request(method, path, b"{}" if method == "POST" else None, self.headers)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None


def has_dead_child(parent: int) -> bool:
    """Whether a child of the process has ended, and it has not asked how."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
            if fields[:1] == ["Z"] and int(fields[1]) == parent:
                return True
    return False


def is_stub(pid: int, models: list[str], parent: int | None = None) -> str | None:
    """The model that the process holds; one that was killed and is not reaped yet holds none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if status[0] == "Z" or len(words) < 2 or parent not in (None, int(status[1])):
        return None
    path = words[1].decode(errors="replace")
    return next((model for model in models if path.startswith(f"{REPOSITORY / model}/")), None)


if __name__ == "__main__":
    given_flags, tritonserver = split_flags(sys.argv[1:])
    sys.exit(Supervisor(tritonserver, given_flags, find_models()).run())
