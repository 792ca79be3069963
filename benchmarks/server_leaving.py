"""The leaving part of benchmarks/server.py: one slot, a client that leaves it, and the next one's wait."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

TIMES = 20
_PIECES = 100  # before a gRPC client leaves: tritonserver's take long enough for /metrics to show the request
ENDLESS = {"text_input": "The", "max_tokens": 2000, "min_tokens": 2000}

Leave = Callable[[threading.Event], float]  # gives when it left, after the event is set

HEAD = "| a client leaves | its slot is free after, ms: median | most | times |\n|---|---|---|---|"


def run_triton(server: Any, run_grpc: Callable[[dict[str, Any]], Any]) -> str:
    """Milliseconds from leaving to the moment at which another request is taken, asked again every 5 ms."""
    job = {"url": f"127.0.0.1:{server.grpc}", "model": "deepseek_v2", "requests": [{**ENDLESS, "stream": True}]}
    rows = [
        _row("tritonserver, HTTP", server, lambda seen: _leave_http(server, seen)),
        _row("tritonserver, gRPC", server, lambda _: _leave_grpc(job, run_grpc)),
    ]
    return "\n".join(rows)


def run_serve(server: Any) -> str:
    """The same of serve, whose whole answers end with their clients, too."""
    rows = [
        _row("serve, streamed", server, lambda seen: _leave_http(server, seen)),
        _row("serve, whole", server, lambda seen: _leave_whole(server, seen)),
    ]
    return "\n".join(rows)


def _row(name: str, server: Any, leave: Leave) -> str:
    waits = [_taken_after(server, leave) for _ in range(TIMES)]
    return f"| {name} | {statistics.median(waits) * 1000:.0f} | {max(waits) * 1000:.0f} | {len(waits)} |"


def _leave_whole(server: Any, seen: threading.Event) -> float:
    connection = server.ask_whole(**ENDLESS)
    seen.wait()
    connection.close()
    return time.monotonic()


def _leave_http(server: Any, seen: threading.Event) -> float:
    events = server.stream(**ENDLESS)
    for _event in events:
        if seen.is_set():
            break
    events.close()
    return time.monotonic()


def _leave_grpc(job: dict[str, Any], run_grpc: Callable[[dict[str, Any]], Any]) -> float:
    ((*_, last),) = run_grpc({**job, "cancel_after": _PIECES})
    left: float = last["left"]
    return left


def _taken_after(server: Any, leave: Leave) -> float:
    """Seconds from leaving to being taken; the client leaves once /metrics has shown its request."""
    assert server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 0), "a slot stays taken"
    left: list[float] = []
    seen = threading.Event()
    client = threading.Thread(target=lambda: left.append(leave(seen)), daemon=True)
    client.start()
    shown = server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 1)
    seen.set()
    assert shown, "the request was never shown"
    while server.generate(text_input="The", max_tokens=1).status != 200:
        time.sleep(0.005)
    taken = time.monotonic()
    client.join()
    return taken - left[0]
