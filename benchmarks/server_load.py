"""The load part of benchmarks/server.py: many requests of all kinds, and what is left of them afterwards."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_apis import Api
from server_client import Answer, Call, Connection

CONNECTIONS = 64
PATIENCE = 60.0  # seconds after which a request counts as hung


@dataclass(frozen=True)
class Request:
    """One request and what should come of it: "whole", "streamed", "left" or "malformed"."""

    kind: str
    call: Call
    tokens: int = 0
    leave_after: int | None = None


def make_requests(api: Api, count: int, seed: int = 0) -> list[Request]:
    """The same ones for a seed: 10 % leave, 5 % are malformed, of the rest a half is streamed."""
    draw = random.Random(seed)
    kinds = ["left"] * (count // 10) + ["malformed"] * (count // 20)
    kinds += [("whole", "streamed")[i % 2] for i in range(count - len(kinds))]
    draw.shuffle(kinds)
    return [_request(api, kind, draw) for kind in kinds]


def _request(api: Api, kind: str, draw: random.Random) -> Request:
    if kind == "malformed":
        return Request(kind, draw.choice(api.malformed))
    prompt = " ".join(draw.choice(("the", "number", "of", "return", "a", "list")) for _ in range(draw.randint(1, 200)))
    tokens = draw.randint(100, 300) if kind == "left" else draw.randint(1, 200)
    leave_after = draw.randint(0, 5) if kind == "left" else None
    call = draw.choice(api.calls)(prompt, tokens, kind != "whole", draw.choice((0.0, 0.8)))
    return Request(kind, call, tokens, leave_after)


async def ask_all(port: int, requests: list[Request]) -> list[Answer | str]:
    """Each request's answer, or what went wrong, in order; each connection takes the next one when it is free."""
    answers: list[Answer | str] = ["never asked"] * len(requests)
    waiting = iter(range(len(requests)))

    async def work() -> None:
        connection = Connection(port)
        for index in waiting:
            request = requests[index]
            try:
                asked = connection.ask(request.call, request.leave_after)
                answers[index] = await asyncio.wait_for(asked, PATIENCE)
            except (TimeoutError, asyncio.TimeoutError):
                answers[index] = "hung"
                connection.close()
            except (OSError, asyncio.IncompleteReadError) as error:
                answers[index] = f"lost: {error!r}"
                connection.close()
        connection.close()

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return answers


def outcome(api: Api, request: Request, answer: Answer | str) -> str:
    """What is wrong with it, or "good"."""
    if isinstance(answer, str):
        return answer
    if request.kind == "left":
        return "good"
    if request.kind == "malformed":
        return "good" if answer.status in api.refusals else f"malformed, but status {answer.status}"
    right = answer.status == 200 and answer.finals == 1 and answer.tokens == request.tokens
    return "good" if right else f"status {answer.status}, {answer.finals} final, {answer.tokens} tokens"


class Memory(threading.Thread):
    """Resident memory of some processes, looked at five times a second until stopped."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self._pids, self._stopped = pids, threading.Event()
        self.megabytes: list[float] = []

    def run(self) -> None:
        while not self._stopped.wait(0.2):
            pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._pids)
            self.megabytes.append(pages * 4096 / 1e6)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def run(server: Any, api: Api, count: int) -> dict[str, str]:
    """Rows of what was asked and what is left."""
    requests = make_requests(api, count)
    asyncio.run(ask_all(server.http, requests[:CONNECTIONS]))  # warms up
    server.wait_for(lambda: _idle(server))
    before, made = _results(server), server.metric("deepseek_trt_output_tokens_total")
    memory = Memory(server.pids())
    memory.start()
    begin = time.perf_counter()
    answers = asyncio.run(ask_all(server.http, requests))
    seconds = time.perf_counter() - begin
    memory.stop()
    idle = server.wait_for(lambda: _idle(server))
    results = {name: value - before[name] for name, value in _results(server).items()}
    tokens = server.metric("deepseek_trt_output_tokens_total") - made
    used = server.metric("deepseek_trt_cache_pages_used")
    code = server.stop()
    outcomes = Counter(outcome(api, *pair) for pair in zip(requests, answers, strict=True))
    third, fourth = _quarter(memory.megabytes, 2), _quarter(memory.megabytes, 3)
    kinds = Counter(request.kind for request in requests)
    return {
        "requests": f"{count:,} over {CONNECTIONS} connections: "
        + ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        "seconds, tokens/s": f"{seconds:.1f}, {tokens / seconds:,.0f}",
        "answers as they should be": f"{outcomes['good']:,}",
        "lost, hung or wrong": _listed({what: n for what, n in outcomes.items() if what != "good"}) or "none",
        "counted by the server": _listed(results),
        "idle afterwards": "yes" if idle else "no",
        "cache pages in use afterwards": f"{used:.0f}",
        "resident memory, third and last quarter of the run": f"{third:.1f} MB, {fourth:.1f} MB",
        "exit code of SIGTERM": str(code),
        "shared memory left": f"{len(server.left)} files",
    }


def table(columns: Mapping[str, dict[str, str]]) -> str:
    """The servers' rows side by side."""
    names = list(next(iter(columns.values())))
    rows = [["load", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(own[name] for own in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _idle(server: Any) -> bool:
    return bool(server.metric("deepseek_trt_inflight_requests") == 0)


def _results(server: Any) -> dict[str, float]:
    found = [s for s in server.metrics() if s.name == "deepseek_trt_requests_total"]
    return {sample.labels["result"]: sample.value for sample in found}


def _listed(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count:.0f} {name}" for name, count in counts.items() if count)


def _quarter(values: list[float], index: int) -> float:
    size = len(values) // 4
    return statistics.median(values[index * size : (index + 1) * size])
