"""Measure what the servers add to their engine, and whether they lose anything under load.

    scripts/server-env
    python benchmarks/server.py [--only rate|load|leaving] [--server tritonserver|serve]

rate: the model with a stand-in engine of 5 ms per step (benchmarks/stand_in.py), by 1 and by 32 streams at once over
HTTP, as a share of the ideal, one token per stream every 5 ms; "none" are the scheduler's steps alone. load: the demo
model, 1,000 requests over 64 connections, of which a tenth leave in the middle and a twentieth are malformed; of serve
completions and chats. leaving: how long a slot stays taken after its client has left. The client runs on the same
machine and takes its share of it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import server_leaving
import server_load
from server_apis import SERVE, TRITON, Api
from server_client import Answer, Connection
from server_harness import harness
from server_serve import Serve, write_package
from stand_in import OrtSession

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.engines.model_repository.folder import write_manifest
from deepseek_trt.engines.model_repository.sizes import SizeRequest
from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.exporter import ExportRequest, export_bundle

STEP_SECONDS = 0.005
TOKENS = 1000
RUNS = 3
PROMPT = "Return the number of"
_VERSIONS = """
import platform, numpy, onnxruntime
print(f"Python {platform.python_version()}, numpy {numpy.__version__}, onnxruntime {onnxruntime.__version__}")
"""


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """The server, started; killed where it is not stopped before."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


@dataclass(frozen=True)
class Triton:
    """How tritonserver is made to serve the demo model, in folders below `folder`."""

    bundle: Path
    folder: Path
    name: str = "tritonserver"
    api: Api = TRITON

    def of(self, max_inflight: int) -> Any:
        repository = write_repository(self.bundle, self.folder / f"of{max_inflight}", max_inflight=max_inflight)
        return harness.Server(repository, self.folder / f"log{max_inflight}")

    def stand_in(self) -> Any:
        repository = write_repository(self.bundle, self.folder / "stand-in")
        put_stand_in(repository)
        return harness.Server(repository, self.folder / "log")

    def leaving(self) -> str:
        with running(self.of(1)) as server:
            return server_leaving.run_triton(server, harness.run_grpc)


@dataclass(frozen=True)
class OwnServer:
    """The same of `deepseek-trt serve`."""

    bundle: Path
    folder: Path
    name: str = "serve"
    api: Api = SERVE

    def of(self, max_inflight: int) -> Any:
        flags = ("--threads", "1", "--max-inflight", str(max_inflight))
        return Serve(self.bundle, self.folder / f"log{max_inflight}", flags)

    def stand_in(self) -> Any:
        package = write_package(self.folder / "package", Path(__file__).with_name("stand_in.py"))
        return Serve(self.bundle, self.folder / "log", ("--threads", "1"), package=package)

    def leaving(self) -> str:
        with running(self.of(1)) as server:
            return server_leaving.run_serve(server)


KINDS = {"tritonserver": Triton, "serve": OwnServer}


def write_repository(bundle: Path, folder: Path, **sizes: Any) -> Path:
    """The demo model's repository, with one thread for ONNX Runtime: the client needs the other."""
    write_model_repository(RepositoryRequest(bundle, folder, sizes=SizeRequest(threads=1, **sizes)))
    return folder


def put_stand_in(repository: Path) -> None:
    """Replace one module of the served runtime, and its hash in the manifest."""
    version = repository / harness.MODEL / "1"
    shutil.copyfile(Path(__file__).with_name("stand_in.py"), version / "runtime/deepseek_trt/engines/sessions/ort.py")
    facts = json.loads((version / "manifest.json").read_text())
    del facts["files"]
    write_manifest(version, facts)


async def one_run(port: int, api: Api, streams: int) -> tuple[float, list[Answer]]:
    """Share of the ideal rate, from the moment of asking to the last token of the last stream."""
    call = api.calls[-1]
    connections = [Connection(port) for _ in range(streams)]
    await asyncio.gather(*(each.ask(call(PROMPT, 2, True, 0.0)) for each in connections))
    answers = await asyncio.gather(*(each.ask(call(PROMPT, TOKENS, True, 0.0)) for each in connections))
    for each in connections:
        each.close()
    assert all(answer.tokens == TOKENS and answer.finals == 1 for answer in answers), "tokens are missing"
    seconds = max(answer.last for answer in answers) - min(answer.sent for answer in answers)
    return TOKENS * STEP_SECONDS / seconds, list(answers)


def rate_table(kinds: list[Any]) -> str:
    lines = [
        "| server | streams | share of the ideal rate, each run | tokens/s, each run | first token, median "
        "| pieces per token |",
        "|---|---|---|---|---|---|",
    ]
    for streams in (1, 32):
        lines.append(bare_row(kinds[0].bundle, streams))
        print(lines[-1], file=sys.stderr)
    for kind in kinds:
        with running(kind.stand_in()) as server:
            for streams in (1, 32):
                runs = [asyncio.run(one_run(server.http, kind.api, streams)) for _ in range(RUNS)]
                lines.append(f"| {kind.name} | {streams} | {_rates(streams, runs)} |")
                print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def bare_row(bundle: Path, streams: int) -> str:
    """The scheduler's steps with nothing around them: more than that no server can give."""
    shares = []
    for _ in range(RUNS):
        opened = Bundle.open(bundle)
        scheduler = Scheduler(OrtSession(opened, streams * TOKENS), opened.manifest.model)
        for _ in range(streams):
            scheduler.add([0, 5, 6, 7], SamplingParams(TOKENS, min_tokens=TOKENS))
        begin = time.perf_counter()
        while scheduler.busy:
            scheduler.step()
        shares.append(TOKENS * STEP_SECONDS / (time.perf_counter() - begin))
    rates = ", ".join(f"{share * streams / STEP_SECONDS:,.0f}" for share in shares)
    return f"| none | {streams} | {', '.join(f'{share:.1%}' for share in shares)} | {rates} | | |"


def _rates(streams: int, runs: list[tuple[float, list[Answer]]]) -> str:
    shares = ", ".join(f"{share:.1%}" for share, _ in runs)
    rates = ", ".join(f"{share * streams / STEP_SECONDS:,.0f}" for share, _ in runs)
    answers = [answer for _, run in runs for answer in run]
    first = statistics.median(answer.first - answer.sent for answer in answers) * 1000
    pieces = sum(answer.pieces for answer in answers) / (len(answers) * TOKENS)
    return f"{shares} | {rates} | {first:.1f} ms | {pieces:.2f}"


def load_table(kinds: list[Any], count: int) -> str:
    columns = {}
    for kind in kinds:
        with running(kind.of(128)) as server:
            columns[kind.name] = server_load.run(server, kind.api, count)
    return server_load.table(columns)


def machine(kinds: list[Any]) -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    parts = [f"{model[1] if model else platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}"]
    names = [kind.name for kind in kinds]
    if "tritonserver" in names:
        listed = subprocess.check_output([str(harness.PYTHON), "-c", _VERSIONS], text=True).strip()
        parts.append(f"tritonserver 2.51.0 (nvidia-pytriton 0.7.0): {listed}")
    if "serve" in names:
        own = ("numpy", "onnxruntime", "starlette", "uvicorn", "h11")
        found = [f"{name} {version}" for name in own if (version := _version(name))]
        parts.append(f"serve: Python {platform.python_version()}, {', '.join(found)}")
    return "; ".join(parts)


def _version(name: str) -> str:
    for package in (name, f"{name}-gpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rate", "load", "leaving"), help="one of the three")
    parser.add_argument("--server", choices=tuple(KINDS), help="one of the two")
    parser.add_argument("--requests", type=int, default=1000, help="of load")
    args = parser.parse_args()
    tables = []
    with tempfile.TemporaryDirectory() as name, as_file(files("deepseek_trt.cli") / "demo_model") as checkpoint:
        folder = Path(name)
        bundle = export_bundle(ExportRequest(checkpoint, folder / "bundle")).bundle.path
        kinds = [make(bundle, folder / own) for own, make in KINDS.items() if args.server in (None, own)]
        if args.only in (None, "rate"):
            tables.append(rate_table(kinds))
        if args.only in (None, "load"):
            tables.append(load_table(kinds, args.requests))
        if args.only in (None, "leaving"):
            tables.append("\n".join([server_leaving.HEAD, *(kind.leaving() for kind in kinds)]))
    print("\n\n".join([*tables, machine(kinds)]))


if __name__ == "__main__":
    main()
