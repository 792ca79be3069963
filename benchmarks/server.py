"""Measure what the server adds to its engine, and whether it loses anything under load.

    scripts/server-env
    python benchmarks/server.py [--only rate|load|leaving]

rate: the served model with a stand-in engine of 5 ms per step (benchmarks/stand_in.py), by 1 and by 32 streams at once,
as a share of the ideal, one token per stream every 5 ms. load: the demo model, 1,000 requests over 64 connections, of
which a tenth leave in the middle and a twentieth are malformed. leaving: how long a slot stays taken after its client
has left. The client runs on the same machine and takes its share of it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType
from typing import Any

import server_leaving
import server_load
from server_client import Answer, Connection

from deepseek_trt.engines.model_repository.folder import write_manifest
from deepseek_trt.engines.model_repository.sizes import SizeRequest
from deepseek_trt.engines.model_repository.writer import RepositoryRequest, write_model_repository
from deepseek_trt.export.exporter import ExportRequest, export_bundle

ROOT = Path(__file__).parents[1]
STEP_SECONDS = 0.005
TOKENS = 1000
RUNS = 3
PROMPT = "Return the number of"
_VERSIONS = """
import platform, numpy, onnxruntime
print(f"Python {platform.python_version()}, numpy {numpy.__version__}, onnxruntime {onnxruntime.__version__}")
"""


def _harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", ROOT / "tests" / "server" / "harness.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module
    spec.loader.exec_module(module)
    return module


harness = _harness()


@contextmanager
def served(repository: Path) -> Iterator[Any]:
    """A running server; killed where it is not stopped before."""
    with tempfile.TemporaryDirectory() as folder:
        server = harness.Server(repository, Path(folder)).start()
        try:
            yield server
        finally:
            server.kill()


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


async def one_run(port: int, streams: int) -> tuple[float, list[Answer]]:
    """Share of the ideal rate, from the moment of asking to the last token of the last stream."""
    body = {"text_input": PROMPT, "max_tokens": TOKENS, "min_tokens": TOKENS}
    connections = [Connection(port) for _ in range(streams)]
    await asyncio.gather(*(each.ask({**body, "max_tokens": 2, "min_tokens": 2}, stream=True) for each in connections))
    answers = await asyncio.gather(*(each.ask(body, stream=True) for each in connections))
    for each in connections:
        each.close()
    assert all(answer.tokens == TOKENS and answer.finals == 1 for answer in answers), "tokens are missing"
    seconds = max(answer.last for answer in answers) - min(answer.sent for answer in answers)
    return TOKENS * STEP_SECONDS / seconds, list(answers)


def rate_table(bundle: Path, folder: Path) -> str:
    repository = write_repository(bundle, folder / "stand-in")
    put_stand_in(repository)
    lines = [
        "| streams | share of the ideal rate, each run | tokens/s, each run | first token, median | pieces per token |",
        "|---|---|---|---|---|",
    ]
    with served(repository) as server:
        for streams in (1, 32):
            runs = [asyncio.run(one_run(server.http, streams)) for _ in range(RUNS)]
            shares = ", ".join(f"{share:.1%}" for share, _ in runs)
            rates = ", ".join(f"{share * streams / STEP_SECONDS:,.0f}" for share, _ in runs)
            answers = [answer for _, run in runs for answer in run]
            first = statistics.median(answer.first - answer.sent for answer in answers) * 1000
            pieces = sum(len(answer.events) for answer in answers) / (len(answers) * TOKENS)
            lines.append(f"| {streams} | {shares} | {rates} | {first:.1f} ms | {pieces:.2f} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    listed = subprocess.check_output([str(harness.PYTHON), "-c", _VERSIONS], text=True).strip()
    return (
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}; "
        f"tritonserver 2.51.0 (nvidia-pytriton 0.7.0), {listed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rate", "load", "leaving"), help="one of the three")
    parser.add_argument("--requests", type=int, default=1000, help="of load")
    args = parser.parse_args()
    tables = []
    with tempfile.TemporaryDirectory() as name, as_file(files("deepseek_trt.cli") / "demo_model") as checkpoint:
        folder = Path(name)
        bundle = export_bundle(ExportRequest(checkpoint, folder / "bundle")).bundle.path
        if args.only in (None, "rate"):
            tables.append(rate_table(bundle, folder))
        if args.only in (None, "load"):
            with served(write_repository(bundle, folder / "load", max_inflight=128)) as server:
                tables.append(server_load.run(server, args.requests))
        if args.only in (None, "leaving"):
            with served(write_repository(bundle, folder / "one", max_inflight=1)) as server:
                tables.append(server_leaving.run(server, harness.run_grpc))
    print("\n\n".join([*tables, machine()]))


if __name__ == "__main__":
    main()
