"""What share of this processor's float32 GEMM peak a prefill reaches: python benchmarks/prefill_peak.py WORKDIR

The peak is the best of the square products that numpy (OpenBLAS) and torch (MKL) make here, of three sizes. OpenBLAS is
told to use AVX-512 where the processor has it: of new ones it does not know that by itself, and MKL uses it on Intel's
alone. Operations of the prefill are counted from the model's sizes (engines/generation/chunking/cost.py). Both by turns
in one process for each number of threads; a share is the median of the rounds' shares. The model is mid_model.py's, its
bundle that of cpu.py, made in WORKDIR where it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cpu_point import Files
from mid_model import write_checkpoint

TOKENS, ROUNDS, SIZES = (128, 512, 2048), 5, (512, 1024, 2048)
HEAD = "| threads | tokens | peak, GFLOP/s | prefill, ms | prefill, GFLOP | GFLOP/s | share of the peak |"


def _seconds(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def peak(threads: int) -> float:
    """GFLOP/s, the best of libraries and sizes; of each the best of eight."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    found = 0.0
    for size in SIZES:
        a, b = torch.rand(size, size), torch.rand(size, size)
        x, y = a.numpy(), b.numpy()
        out, into = torch.empty(size, size), np.empty((size, size), np.float32)
        products = (partial(torch.mm, a, b, out=out), partial(np.matmul, x, y, out=into))
        best = min(_seconds(product) for product in products for _ in range(8))
        found = max(found, 2e-9 * size**3 / best)
    return found


def measure(bundle: Path, threads: int) -> list[dict[str, float]]:
    """Of each round and prompt: tokens, the peak in GFLOP/s, milliseconds, GFLOP."""
    import numpy as np

    from deepseek_trt.engines.generation.chunking.cost import PrefillCost
    from deepseek_trt.engines.generation.pages import page_table
    from deepseek_trt.engines.sessions.ort import OrtSession
    from deepseek_trt.export.bundle.folder import Bundle

    opened = Bundle.open(bundle)
    pages = opened.manifest.cache.pages_for(max(TOKENS))
    session, cost = OrtSession(opened, pages + 1, threads), PrefillCost.of_model(opened.manifest.model)
    ids = np.random.default_rng(0).integers(2, opened.manifest.model.vocab_size, (1, max(TOKENS)))
    table = page_table([range(1, pages + 1)])
    rows = []
    for round_ in range(ROUNDS + 1):
        for count in TOKENS:
            best = peak(threads)
            inputs = ids[:, :count], np.array([count], np.int32), np.zeros(1, np.int32), table
            took = min(_seconds(partial(session.prefill, *inputs)) for _ in range(2))
            if round_:  # the first warms up
                rows.append({"tokens": count, "peak": best, "ms": 1e3 * took, "gflop": 2e-9 * cost.of(count, 0)})
    return rows


def lines(threads: int, rows: list[dict[str, float]]) -> list[str]:
    made = []
    for count in TOKENS:
        own = [row for row in rows if row["tokens"] == count]
        best, ms = (statistics.median(row[name] for row in own) for name in ("peak", "ms"))
        share = statistics.median(1e3 * row["gflop"] / row["ms"] / row["peak"] for row in own)
        gflop = own[0]["gflop"]
        made.append(
            f"| {threads} | {count:,} | {best:.0f} | {ms:.0f} | {gflop:.0f} | {1e3 * gflop / ms:.0f} | {share:.0%} |"
        )
    return made


def in_process(bundle: Path, threads: int) -> list[dict[str, float]]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    wide = {"OPENBLAS_CORETYPE": "SKYLAKEX"} if has_avx512() else {}
    command = [sys.executable, __file__, ".", "--child", str(bundle), str(threads)]
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), **wide}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, float]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def bundle_in(work: Path) -> Path:
    from deepseek_trt.export.exporter import ExportRequest, export_bundle

    files = Files(work, "whole")
    out = files.bundle("float32")
    if not (out / "manifest.json").exists():
        write_checkpoint(files.checkpoint)
        export_bundle(ExportRequest(files.checkpoint, out))
    return out


def has_avx512() -> bool:
    return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(Path(given.child[0]), int(given.child[1]))))
        return
    bundle, cpu = bundle_in(given.workdir), Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", cpu)
    wide = "with" if has_avx512() else "without"
    made = [line for threads in given.threads for line in lines(threads, in_process(bundle, threads))]
    print(f"{name[1] if name else 'unknown processor'} {wide} AVX-512.\n")
    print("\n".join([HEAD, "|---" * (HEAD.count("|") - 1) + "|", *made]))


if __name__ == "__main__":
    main()
