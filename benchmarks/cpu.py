"""Decode and prefill on this machine's CPU against transformers and llama.cpp: same weights, same prompts.

    python benchmarks/cpu.py WORKDIR                       # some 40 minutes with two cores, the first time
    python benchmarks/cpu.py WORKDIR --table long          # prompts of 2,048 and 8,192 tokens
    python benchmarks/cpu.py WORKDIR --table narrow        # weights of 8 and 4 bits, and what they cost
    python benchmarks/cpu.py WORKDIR --only ours --fresh   # ours again
    python benchmarks/cpu.py WORKDIR --seconds 240         # stop after so long; the same command goes on from there

Makes what it needs in WORKDIR (20 GB): a model of random weights (mid_model.py), its bundles and GGUFs, llama.cpp
built from the sdist of llama-cpp-python for this machine, and each runner's caches of the longest prompts. Then, at
each point, the runners measure one after the other, each in a process of its own, in several rounds: machines drift,
so a ratio is taken within a round. Beside each time stands the largest difference of that runner's logits from
transformers', as a share of the largest logit. Only transformers and the package's own dependencies are needed here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_plan import EXPORTS, PLANS, REFERENCE, RUNNERS, Plan
from cpu_point import Files, Job, Point
from cpu_table import markdown
from mid_model import write_checkpoint

from deepseek_trt.export.json_text import json_text

# llama.cpp's options by the processor's flags. AMX stays out: with it llama.cpp aborts on narrow weights of MLA models
# (0.3.36: "GGML_ASSERT(*cur_backend_id != -1)", of attn_k_b), and its other kernels are those of GGML_NATIVE.
_LLAMA_OPTIONS = {
    "avx2": "GGML_AVX2",
    "fma": "GGML_FMA",
    "f16c": "GGML_F16C",
    "bmi2": "GGML_BMI2",
    "avx_vnni": "GGML_AVX_VNNI",
    "avx512f": "GGML_AVX512",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
}
_LLAMA_PARTS = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TOOLS", "GGML_NATIVE")


@dataclass(frozen=True)
class Cell:
    """One process that measures."""

    round: int
    point: Point
    runner: str

    @property
    def key(self) -> str:
        return f"{self.round}/{self.point.threads} threads/{self.point.name}/{self.runner}"


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    plan = PLANS[args.table]
    for round_ in range(args.rounds):
        for threads in args.threads:
            if "stream" in args.only:
                yield Cell(round_, Point("prefill", 1, 1, threads), "stream")
            for point in plan.points(threads):
                runners = [name for name in args.only if name != "stream" and _measures(name, point)]
                yield from (Cell(round_, point, name) for name in runners if point.kind != "quality" or not round_)


def _measures(runner: str, point: Point) -> bool:
    return point.kind != "beside" or runner.startswith("ours")


def prepare(files: Files, args: argparse.Namespace) -> None:
    files.own.mkdir(parents=True, exist_ok=True)
    write_checkpoint(files.checkpoint)
    for form in dict.fromkeys(RUNNERS[name].form for name in args.only if name.startswith("ours")):
        _export(files, form)
    if any(RUNNERS[runner].llama for runner in args.only) and not args.llama_python:
        args.llama_python = str(_build_llama(files.folder / "llama-venv"))
    for name in [name for name in RUNNERS if name in args.only or name == REFERENCE]:
        done = files.own / f"{name}.filled"
        if name != "stream" and not done.exists():
            print(f"{name}: filling caches", file=sys.stderr)
            _start(files, args, name, None, max(args.threads))
            done.touch()


def _export(files: Files, form: str) -> None:
    bundle = files.bundle(form)
    if not (bundle / "manifest.json").exists():
        script = "from deepseek_trt.cli.main import main; main()"
        command = [sys.executable, "-c", script, "export", files.checkpoint, bundle, *_narrowed(files, form)]
        subprocess.run(command, stdout=sys.stderr, check=True)  # what we print is the tables


def _narrowed(files: Files, form: str) -> list[str]:
    rules = EXPORTS[form]
    if rules is None:
        return []
    if isinstance(rules, list):
        path = files.folder / f"{form}.json"
        path.write_text(json_text(rules), encoding="utf-8")
        rules = str(path)
    return ["--quantize", rules, "--dtype", "float16"]


def _llama_build() -> dict[str, str]:
    """The environment in which pip builds llama.cpp for this processor."""
    found = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    options = [f"-D{part}=OFF" for part in _LLAMA_PARTS]
    options += [f"-D{option}={'ON' if flag in found else 'OFF'}" for flag, option in _LLAMA_OPTIONS.items()]
    return {"CMAKE_ARGS": " ".join(options), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}


def _build_llama(folder: Path) -> Path:
    python, done = folder / "bin" / "python", folder / "built"
    if not done.exists():
        print("building llama.cpp: many minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = ["llama-cpp-python", "gguf", "safetensors"]
        # No wheel of pip's cache: it knows nothing of the options.
        install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-binary", "llama-cpp-python", *packages]
        subprocess.run(install, check=True, env={**os.environ, **_llama_build()})
        done.touch()
    return python


def _start(files: Files, args: argparse.Namespace, name: str, point: Point | None, threads: int) -> dict[str, Any]:
    """Run a runner to its end; its last line is its result."""
    runner = RUNNERS[name]
    contexts = {str(batch): lengths for batch, lengths in PLANS[args.table].contexts.items()}
    measured = dataclasses.asdict(point) if point else None
    job = Job(str(files.folder), args.table, name, runner.form, measured, contexts, threads)
    command = job.command(str(args.llama_python) if runner.llama else sys.executable, runner.script)
    environment = {**os.environ, **runner.environment, "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def measure_all(files: Files, args: argparse.Namespace) -> dict[str, Any]:
    """Results by cell: those kept in WORKDIR, and those missing, until --seconds are over."""
    path, begin = files.own / "results.json", time.monotonic()
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if args.fresh:
        results = {key: value for key, value in results.items() if key.rpartition("/")[2] not in args.only}
    for cell in cells(args):
        if cell.key in results:
            continue
        if args.seconds and time.monotonic() - begin > args.seconds:
            print("stopped: the same command without --fresh goes on", file=sys.stderr)
            break
        result = _start(files, args, cell.runner, cell.point, cell.point.threads)
        results[cell.key] = {**result, "at": time.strftime("%F %H:%M", time.gmtime())}
        print(f"{cell.key}: {min(result['ms'], default=0):.1f} ms, {result['error']:.1e}", file=sys.stderr)
        path.write_text(json_text(results, indent=1), encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--table", choices=PLANS, default="whole", help="what is measured (cpu_plan.py)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="3, of long prompts 1, unless given")
    parser.add_argument("--only", nargs="+", choices=RUNNERS, help="these runners of the table")
    parser.add_argument("--fresh", action="store_true", help="forget earlier times of the runners that run")
    parser.add_argument("--seconds", type=float, help="start no measurement after so long")
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python, gguf and safetensors")
    parser.add_argument("--json", action="store_true", help="print JSON instead of markdown")
    args = parser.parse_args()
    plan: Plan = PLANS[args.table]
    args.only = [name for name in plan.runners if not args.only or name in args.only]
    args.rounds = args.rounds or plan.rounds
    files = Files(args.workdir.resolve(), args.table)
    prepare(files, args)
    results = measure_all(files, args)
    print(json_text(results) if args.json else markdown(results, plan, args))


if __name__ == "__main__":
    main()
