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

from cpu_plan import RUNNERS, Plan
from cpu_point import Point
from cpu_stream import gigabytes_a_second
from make_checkpoint import tensors_of
from mid_model import CONFIG

Results = dict[str, Any]
_ROUTED = ".mlp.experts."  # in their names
_VERSIONS = ("deepseek-trt", "onnxruntime-gpu", "torch", "transformers", "numpy")


def markdown(results: Results, plan: Plan, args: argparse.Namespace) -> str:
    parts = [_machine(results, args)]
    for threads in args.threads:
        points = [point for point in plan.points(threads) if point.kind != "quality"]
        parts += [f"**{threads} thread{'s' * (threads > 1)}**: {_bandwidth_line(results, threads)}"]
        parts += [_table(results, plan, points)]
    return "\n\n".join([*parts, *_quality(results, plan)])


def _table(results: Results, plan: Plan, points: Sequence[Point]) -> str:
    runners = [name for name in plan.runners if name != "stream"]
    own = [name for name in runners if name.startswith("ours")] if "stream" in plan.runners else []
    floors = [f"floor {_ours(name)}" if len(own) > 1 else "floor" for name in own]
    ratios = [f"{RUNNERS[peer].title} / {_ours(own)}" for peer, own in plan.pairs]
    head = ["point", *floors, *(RUNNERS[name].title for name in runners), *ratios]
    lines = [head, ["---"] * len(head)]
    for point in points:
        floor = [_floor(results, point, RUNNERS[name].form) for name in own]
        times = [_time(results, point, runner) for runner in runners]
        lines.append([point.name, *floor, *times, *(_ratio(results, point, *pair) for pair in plan.pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ours(runner: str) -> str:
    return RUNNERS[runner].title.replace("deepseek-trt", "").strip() or "ours"


def _quality(results: Results, plan: Plan) -> list[str]:
    """What narrow weights cost, a row for each runner; nothing where none was asked."""
    found = {key.rpartition("/")[2]: result for key, result in results.items() if "kl" in result}
    if not found:
        return []
    point = next(point for point in plan.points(1) if point.kind == "quality")
    rows = [f"| {RUNNERS[name].title} | {r['kl']:.5f} | {r['top1']:.1%} |" for name, r in found.items()]
    head = f"| {point.name}: last logits | KL from float32, nats | same likeliest token |"
    return ["\n".join([head, "| --- | --- | --- |", *rows])]


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
    facts = [f"**{middle}** ({low}-{high})", *([f"{error:.0e}"] * bool(error))]
    last = _found(results, point, runner)[0]
    facts += [f"waits of {last['wait_ms']:.0f}"] if "wait_ms" in last else []
    facts += [f"{last['grown_mb']:.0f} MB more"] if point.kind == "prefill" and last.get("grown_mb", 0) >= 1 else []
    return ", ".join(facts)


def _ratio(results: Results, point: Point, runner: str, own: str) -> str:
    """The median over rounds of their time divided by ours in the same round."""
    theirs, ours = _medians(results, point, runner), _medians(results, point, own)
    ratios = [theirs[number] / ours[number] for number in theirs.keys() & ours.keys()]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def _bandwidth(results: Results, threads: int) -> float | None:
    """Bytes a second, of the fastest reading of 1 GiB in any round."""
    found = [r for key, r in results.items() if key.endswith("/stream") and f"/{threads} threads/" in key]
    return max(gigabytes_a_second(min(r["ms"])) for r in found) if found else None


def _bandwidth_line(results: Results, threads: int) -> str:
    speed = _bandwidth(results, threads)
    return "memory read not measured" if speed is None else f"memory is read at {speed:.1f} GB/s"


def _floor(results: Results, point: Point, form: str) -> str:
    """Milliseconds in which memory gives what a decode must read."""
    speed = _bandwidth(results, point.threads)
    if speed is None or point.kind == "prefill":
        return "-"
    return f"{(weight_bytes(point.batch, form) + cache_bytes(point, form)) / speed / 1e6:.1f}"


def weight_bytes(batch: int, form: str) -> float:
    """Weights that a step reads, with as many experts hit as uniform routing hits on average."""
    c, total = CONFIG, 0.0
    hit = 1 - (1 - c["num_experts_per_tok"] / c["n_routed_experts"]) ** batch
    for name, _, shape in tensors_of(c):
        if "embed_tokens" not in name:
            size = _bytes_a_number(form, name, len(shape)) * shape[0] * (shape[1] if len(shape) > 1 else 1)
            total += size * (hit if _ROUTED in name else 1)
    return total


def _bytes_a_number(form: str, name: str, dimensions: int) -> float:
    """As docs/narrow.md says: a float16 scale for every 32 codes; norms, routers and kv_b_proj stay whole."""
    if form == "float32" or dimensions < 2 or "kv_b_proj" in name or name.endswith("mlp.gate.weight"):
        return _whole_bytes(form)
    is_int4 = "lm_head" not in name if form == "int4-everywhere" else form == "int4" and _ROUTED in name
    return (4.5 if is_int4 else 8.5) / 8


def _whole_bytes(form: str) -> int:
    """Of a number that stays whole, and of a cached one: cpu_plan.py's EXPORTS."""
    return 4 if form == "float32" else 2


def cache_bytes(point: Point, form: str) -> int:
    width = CONFIG["kv_lora_rank"] + CONFIG["qk_rope_head_dim"]
    return int(point.batch * point.context * CONFIG["num_hidden_layers"] * width * _whole_bytes(form))


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
        "deepseek-trt is faster. Floor: what of our weights and cache the step must read, at the speed memory is read. "
        "MB more: the process's memory while the prompt is computed, beside what it had before. Waits: the longest "
        "of the steps that held a chunk of the prompt."
    )
