"""Validate V2-Lite (31.4 GB) and two layers of V2 layer by layer; print time and peak memory.

    python benchmarks/validate.py --disk /tmp            # needs 15 GB of it
    python benchmarks/validate.py --only v2-lite         # 7 GB

Checkpoints have the published names and shapes. The layers that are compared, the embedding and the head hold random
numbers (make_checkpoint.fill_random); the others are holes in sparse files and read as zeros. Each row is one
deepseek-trt command as a process of its own, on a bundle by reference; peak memory is what it and its children held.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from make_checkpoint import PUBLISHED, Published, fill_random, reduced, write_sparse
from process import run_measured

from export import machine, scratch

_MAIN = "from deepseek_trt.cli.main import main; main()"


@dataclass(frozen=True)
class Row:
    """One line of the table; `worst` is the error nearest to its tolerance, as a part of it."""

    what: str
    seconds: float
    peak_mb: float
    passed: bool
    worst: dict[str, float]


def measure(what: str, published: Published, layers: str, compared: set[int], folder: Path, threads: int) -> Row:
    checkpoint, bundle, report = (folder / name for name in ("checkpoint", "bundle", "report"))
    total = write_sparse(published, checkpoint)
    fill_random(checkpoint, compared)
    run_measured([sys.executable, "-c", _MAIN, "export", str(checkpoint), str(bundle), "--by-reference"])
    command = ["validate", str(bundle), "--layers", layers, "--backend", "exported", "--backend", "torch"]
    try:
        took = run_measured(
            [sys.executable, "-c", _MAIN, *command, "--report", str(report), "--threads", str(threads), "--json"]
        )
    except subprocess.CalledProcessError as error:
        print(error.output, file=sys.stderr)
        raise
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    worst = {
        b["backend"]: max(float(o["max_relative"]) / o["tolerance"] for o in b["outputs"]) for b in found["backends"]
    }
    return Row(f"{what}, {total / 1e9:.1f} GB, --layers {layers}", took.seconds, took.peak_mb, found["passed"], worst)


def table(rows: list[Row]) -> str:
    backends = list(rows[0].worst)
    head = ["validate", "seconds", "peak memory, MB", "passed", *(f"{b}: largest error / tolerance" for b in backends)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        cells = [r.what, f"{r.seconds:.0f}", f"{r.peak_mb:,.0f}", "yes" if r.passed else "no"]
        lines.append("| " + " | ".join([*cells, *(f"{r.worst[b]:.2f}" for b in backends)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--only", choices=("v2-lite", "v2"), help="one of the two")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime and torch")
    args = parser.parse_args()
    jobs = {
        "v2-lite": (PUBLISHED["v2-lite"], "0-3,26", {0, 1, 2, 3, 26}),
        "v2": (reduced(PUBLISHED["v2"], layers=2), "0-1", {0, 1}),
    }
    rows = []
    for name, (published, layers, compared) in jobs.items():
        if args.only in (None, name):
            with scratch(args.disk) as folder:
                what = name if name == "v2-lite" else "v2, first two layers"
                rows.append(measure(what, published, layers, compared, folder, args.threads))
            print(rows[-1], file=sys.stderr)
    print(f"{table(rows)}\n\n{machine()}, {args.threads} thread(s)")


if __name__ == "__main__":
    main()
