"""The markdown that cpu.py prints."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_point import Point
from cpu_stream import gigabytes_a_second
from make_checkpoint import tensors_of
from mid_model import CONFIG

Results = dict[str, Any]
NAMES = {"transformers": "transformers", "llama-exact": "llama.cpp exact", "llama-fast": "llama.cpp fastest"}
_FLOAT = 4
_VERSIONS = ("deepseek-trt", "onnxruntime-gpu", "torch", "transformers", "numpy")


def markdown(results: Results, points: Sequence[Point], args: argparse.Namespace) -> str:
    parts = [_machine(results, args)]
    for threads in args.threads:
        parts += [f"**{threads} thread{'s' * (threads > 1)}**: {_bandwidth_line(results, threads)}"]
        parts += [_table(results, [p for p in points if p.threads == threads])]
    return "\n\n".join(parts)


def _table(results: Results, points: Sequence[Point]) -> str:
    head = ["point", "floor", *NAMES.values(), "deepseek-trt", *(f"{name} / ours" for name in NAMES.values())]
    lines = [head, ["---"] * len(head)]
    for point in points:
        times = [_time(results, point, runner) for runner in (*NAMES, "ours")]
        ratios = [_ratio(results, point, runner) for runner in NAMES]
        lines.append([point.name, _floor(results, point), *times, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _found(results: Results, point: Point, runner: str) -> dict[int, Any]:
    """Results by round."""
    end = f"/{point.threads} threads/{point.name}/{runner}"
    return {int(key.partition("/")[0]): value for key, value in results.items() if key.endswith(end)}


def _medians(results: Results, point: Point, runner: str) -> dict[int, float]:
    return {number: statistics.median(r["ms"]) for number, r in _found(results, point, runner).items()}


def _time(results: Results, point: Point, runner: str) -> str:
    """Milliseconds: the median of the rounds, the lowest and highest round; and the difference of the logits."""
    medians = sorted(_medians(results, point, runner).values())
    if not medians:
        return "-"
    error = max(r["error"] for r in _found(results, point, runner).values())
    places = 0 if medians[0] >= 100 else 1
    low, middle, high = (f"{t:.{places}f}" for t in (medians[0], statistics.median(medians), medians[-1]))
    return f"**{middle}** ({low}-{high}), {error:.0e}"


def _ratio(results: Results, point: Point, runner: str) -> str:
    """The median over rounds of their time divided by ours in the same round."""
    theirs, ours = _medians(results, point, runner), _medians(results, point, "ours")
    ratios = [theirs[number] / ours[number] for number in theirs.keys() & ours.keys()]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def _bandwidth(results: Results, threads: int) -> float | None:
    """Bytes a second, of the fastest reading of 1 GiB in any round."""
    found = [r for key, r in results.items() if key.endswith("/stream") and f"/{threads} threads/" in key]
    return max(gigabytes_a_second(min(r["ms"])) for r in found) if found else None


def _bandwidth_line(results: Results, threads: int) -> str:
    speed = _bandwidth(results, threads)
    return "memory read not measured" if speed is None else f"memory is read at {speed:.1f} GB/s"


def _floor(results: Results, point: Point) -> str:
    """Milliseconds in which memory gives what a decode must read."""
    speed = _bandwidth(results, point.threads)
    if speed is None or point.kind == "prefill":
        return "-"
    return f"{(weight_bytes(point.batch) + cache_bytes(point)) / speed / 1e6:.1f}"


def weight_bytes(batch: int) -> float:
    """Weights that a step reads, with as many experts hit as uniform routing hits on average."""
    c, total = CONFIG, 0.0
    hit = 1 - (1 - c["num_experts_per_tok"] / c["n_routed_experts"]) ** batch
    for name, _, shape in tensors_of(c):
        if "embed_tokens" not in name:
            size = _FLOAT * shape[0] * (shape[1] if len(shape) > 1 else 1)
            total += size * (hit if ".experts." in name else 1)
    return total


def cache_bytes(point: Point) -> int:
    width = CONFIG["kv_lora_rank"] + CONFIG["qk_rope_head_dim"]
    return int(point.batch * point.context * CONFIG["num_hidden_layers"] * width * _FLOAT)


def _machine(results: Results, args: argparse.Namespace) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS]
    if args.llama_python:
        script = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
        ran = subprocess.run([args.llama_python, "-c", script], text=True, capture_output=True, check=True)
        versions.append(f"llama-cpp-python {ran.stdout.strip()} built from its sdist for this CPU")
    stamps = sorted(r["at"] for r in results.values())
    measured = f"{stamps[0]} to {stamps[-1]} UTC" if stamps else "nothing yet"
    return (
        f"{cpu[1] if cpu else 'unknown CPU'}, {os.cpu_count()} cores, {memory:.0f} GiB; Python "
        f"{sys.version.split()[0]}, {', '.join(versions)}; measured {measured}, {args.rounds} rounds. "
        "Milliseconds per step: median of the rounds (lowest and highest round), largest difference of the logits from "
        "transformers' as a share of the largest logit. Ratios are medians of the ratios of each round; above 1 "
        "deepseek-trt is faster. Floor: weights and cache that the step must read, at the speed memory is read."
    )
