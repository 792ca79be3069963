"""The leaving part of benchmarks/server.py: one slot, a client that leaves it, and the next one's wait."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

TIMES = 20
_PIECES = 100  # before leaving: long enough for /metrics to show the request
ENDLESS = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000}


HEAD = "| a client leaves | its slot is free after, ms: median | most | times |\n|---|---|---|---|"


def run_triton(server: Any, run_grpc: Callable[[dict[str, Any]], Any]) -> str:
    """Milliseconds from leaving to the moment at which another request is taken, asked again every 5 ms."""
    job = {"url": f"127.0.0.1:{server.grpc}", "model": "deepseek_v2", "requests": [{**ENDLESS, "stream": True}]}
    rows = [
        _row("tritonserver, HTTP", server, lambda: _leave_http(server)),
        _row("tritonserver, gRPC", server, lambda: _leave_grpc(job, run_grpc)),
    ]
    return "\n".join(rows)


def run_serve(server: Any) -> str:
    """The same of serve, whose whole answers end with their clients, too."""
    rows = [
        _row("serve, streamed", server, lambda: _leave_http(server)),
        _row("serve, whole", server, lambda: _leave_whole(server)),
    ]
    return "\n".join(rows)


def _row(name: str, server: Any, leave: Callable[[], float]) -> str:
    waits = [_taken_after(server, leave) for _ in range(TIMES)]
    return f"| {name} | {statistics.median(waits) * 1000:.0f} | {max(waits) * 1000:.0f} | {len(waits)} |"


def _leave_whole(server: Any) -> float:
    connection = server.ask_whole(**ENDLESS)
    time.sleep(0.2)  # long enough for /metrics to show the request
    connection.close()
    return time.monotonic()


def _leave_http(server: Any) -> float:
    events = server.stream(**ENDLESS)
    for _, _event in zip(range(_PIECES), events, strict=False):
        pass
    events.close()
    return time.monotonic()


def _leave_grpc(job: dict[str, Any], run_grpc: Callable[[dict[str, Any]], Any]) -> float:
    ((*_, last),) = run_grpc({**job, "cancel_after": _PIECES})
    left: float = last["left"]
    return left


def _taken_after(server: Any, leave: Callable[[], float]) -> float:
    """Seconds from leaving to being taken."""
    server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 0)
    left: list[float] = []
    client = threading.Thread(target=lambda: left.append(leave()))
    client.start()
    server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 1)
    while server.generate(text_input="The", max_tokens=1).status != 200:
        time.sleep(0.005)
    taken = time.monotonic()
    client.join()
    return taken - left[0]
