"""Random load on the runtime and on the real server until the time is over: nothing may be lost, left behind, or grow.

    scripts/server-env
    python benchmarks/soak.py --seconds 60 [--only runtime|server] [--seed 0]

Half of the time goes to the runtime (threads, tasks and streams over one LLM, a third of which cancel or leave; bad
requests; known prompts whose answers are compared; the LLM opened anew every four seconds), half to tritonserver over
HTTP (whole and streamed requests, leaving ones, malformed ones; the model loaded anew between rounds). Exits with 1
where an answer is wrong or missing, a page, thread or file of shared memory is left, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from server import Triton, running
from server_apis import TRITON
from server_load import ask_all, make_requests, outcome

from deepseek_trt.export.exporter import ExportRequest, export_bundle

ROUND = 100  # requests to the server between two loads of the model
GROWTH = 1.1  # of resident memory from the third quarter of the rounds to the last: what an allocator may keep
ENOUGH = 8  # rounds, to say that
Part = dict[str, Any]


def soak_runtime(bundle: Path, seconds: float, seed: int) -> Part:
    script = Path(__file__).with_name("soak_runtime.py")
    words = [sys.executable, script, bundle, "--seconds", seconds, "--seed", seed]
    ran = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
    found: Part = json.loads(ran.stdout)
    return found


def soak_server(bundle: Path, folder: Path, seconds: float, seed: int) -> Part:
    """As the runtime's, over HTTP; the model is loaded anew between rounds, in a process of its own each time."""
    end, found, memory, left = time.monotonic() + seconds, Counter[str](), [], Counter[str]()
    with running(Triton(bundle, folder).of(128)) as server:
        while time.monotonic() < end:
            requests = make_requests(TRITON, ROUND, seed + len(memory))
            answers = asyncio.run(ask_all(server.http, requests))
            for request, answer in zip(requests, answers, strict=True):
                what = outcome(TRITON, request, answer)
                found[request.kind if what == "good" else f"wrong: {request.kind}: {what}"] += 1
            if not server.wait_for(lambda: server.metric("deepseek_trt_inflight_requests") == 0):
                left["requests"] += 1
            left["pages"] += int(server.metric("deepseek_trt_cache_pages_used"))
            memory.append(_resident_mb(server.server_pid()) + sum(map(_resident_mb, server.stub_pids())))
            print(f"server, round {len(memory)}: {memory[-1]:.0f} MB", file=sys.stderr, flush=True)
            if server.load().status != 200:
                left["loads that failed"] += 1
            server.wait_for(lambda: len(server.stub_pids()) == 1 and server.ready())
        left["exit code"] = server.stop()
        left["files of shared memory"] = len(server.left)
    return {"found": dict(found), "memory": memory, "left": dict(left)}


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def quarters(memory: list[float]) -> tuple[float, float]:
    """The least of the third and of the last quarter of the rounds: what stays held, whatever else comes and goes."""
    size = max(len(memory) // 4, 1)
    return min(memory[-2 * size : -size] or memory), min(memory[-size:])


def faults(part: Part) -> list[str]:
    third, last = quarters(part["memory"])
    wrong = [f"{count} {what}" for what, count in part["found"].items() if what.startswith("wrong")]
    wrong += [f"left: {count} {what}" for what, count in part["left"].items() if count]
    grows = len(part["memory"]) >= ENOUGH and last > GROWTH * third
    return wrong + ([f"memory grows: {third:.0f} to {last:.0f} MB"] if grows else [])


def table(parts: dict[str, Part]) -> str:
    lines = [
        "| | rounds | what came of it | left | least memory, third and last quarter | faults |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        third, last = quarters(part["memory"])
        found, left = (", ".join(f"{n:,} {what}" for what, n in part[key].items()) for key in ("found", "left"))
        wrong = "; ".join(faults(part)) or "none"
        lines.append(f"| {name} | {len(part['memory'])} | {found} | {left} | {third:.0f} MB, {last:.0f} MB | {wrong} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", choices=("runtime", "server"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    share = given.seconds if given.only else given.seconds / 2
    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as name, as_file(files("deepseek_trt.cli") / "demo_model") as checkpoint:
        bundle = export_bundle(ExportRequest(checkpoint, Path(name) / "bundle")).bundle.path
        if given.only in (None, "runtime"):
            parts["runtime"] = soak_runtime(bundle, share, given.seed)
        if given.only in (None, "server"):
            parts["server"] = soak_server(bundle, Path(name), share, given.seed)
    print(f"{table(parts)}\n\n{given.seconds:.0f} seconds, seed {given.seed}.")
    sys.exit(any(map(faults, parts.values())))


if __name__ == "__main__":
    main()
