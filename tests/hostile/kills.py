"""What tests of killed servers share: a place of their own for each chain of kills, and what must not be left of them.

Every process that a server starts is known by its PATH, which holds the place.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_trt.export.trust.cache import cache_folder

WAIT = 600.0  # seconds before what waits gives up
MOMENTS = ("starting", "working", "draining")


@dataclass
class Place:
    """Temporary files, cache and log of servers on one port; `seconds` from each kill to the last process's end."""

    folder: Path
    port: int = 0
    seconds: list[float] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.temporary, self.cache, self.log = self.folder / "tmp", self.folder / "cache", self.folder / "log"
        self.temporary.mkdir(parents=True)
        shutil.copytree(cache_folder() / "cpu", self.cache / "deepseek-trt" / "cpu")
        for part in (self.cache, self.cache / "deepseek-trt", self.cache / "deepseek-trt" / "cpu"):
            part.chmod(0o700)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{os.environ['PATH']}:{self.folder / 'none'}"
        return {**os.environ, "TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(self.cache), "PATH": path}

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Processes that live here, zombies left out."""
        mark, found = os.fsencode(self.folder / "none"), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes():  # a zombie's is empty
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def files(self) -> list[str]:
        """All that lies here."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))

    def wait_until_empty(self) -> None:
        """All processes end by themselves."""
        began = time.monotonic()
        wait_until(
            lambda: not self.pids(), lambda: f"{[command_of(pid) for pid in self.pids()]}\n{self.said()[-4000:]}"
        )
        self.seconds.append(time.monotonic() - began)

    def end(self) -> None:
        """Kill what is left, for a test that failed."""
        for pid in self.pids():
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait(WAIT)

    # HTTP

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON; OSError or HTTPException where the server has gone."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read()
        return response.status, json.loads(text) if text.startswith(b"{") else text

    def is_ready(self, path: str) -> bool:
        try:
            return self.ask("GET", path)[0] == 200
        except (OSError, http.client.HTTPException):
            return False


class Clients:
    """Requests that run until they end, however they end; none may wait for ever."""

    def __init__(self, place: Place, path: str, bodies: list[dict[str, Any]]) -> None:
        self._begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, args=(place, path, body), daemon=True) for body in bodies]
        for thread in self._threads:
            thread.start()
        for _ in bodies:
            assert self._begun.acquire(timeout=WAIT)

    def _run(self, place: Place, path: str, body: dict[str, Any]) -> None:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", place.port, timeout=WAIT)) as connection:
                connection.request("POST", path, json.dumps(body))
                response = connection.getresponse()
                response.readline()  # it is being answered
                self._begun.release()
                while response.readline():
                    pass
        except (OSError, http.client.HTTPException, ValueError):
            pass
        finally:
            self._begun.release()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()


def moments(times: int, seed: str) -> list[tuple[str, float]]:
    """When each kill comes, and a number from 0 to 1: while it starts and afterwards in turn, so that every killed
    start is followed by one that answers.
    """
    generator = random.Random(seed)
    return [("starting" if n % 2 else MOMENTS[1 + n // 2 % 2], generator.random()) for n in range(times)]


def wait_until(holds: Callable[[], bool], why: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def descendant(pid: int, word: str) -> int | None:
    """A process below `pid` whose command line holds `word`, or none."""
    with suppress(OSError):  # it has ended
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        for child in children:
            found = child if word in command_of(child) else descendant(child, word)
            if found is not None:
                return found
    return None


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def program(*arguments: object) -> list[str]:
    """The command line of deepseek-trt."""
    return [sys.executable, "-c", "from deepseek_trt.cli.start import main; main()", *map(str, arguments)]
