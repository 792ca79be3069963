"""Export V2-Lite (31.4 GB) and V2 (471 GB) on this machine, build their plugins and engines; print time, memory, bytes.

    python benchmarks/export.py                        # needs 35 GB of disk for the export with weights
    python benchmarks/export.py --without-weights

Checkpoints are sparse files (make_checkpoint.py): they take no disk and read as zeros. The export with weights is
compared with cp of the same files on the same disk, holes written out, in the same run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from make_checkpoint import PUBLISHED, reduced, write_sparse
from process import run_measured

SMS = (86, 120)
_VERSIONS = ("deepseek-trt", "torch", "onnx", "onnx-ir", "onnxscript", "triton", "tensorrt-rtx-cu13")


@dataclass(frozen=True)
class Row:
    """One line of the table. `writing` is the seconds of the step that writes weights, 0 where there is none."""

    what: str
    seconds: float
    writing: float
    peak_mb: float
    written_mb: float
    nodes: int


def child(checkpoint: Path, out: Path, by_reference: bool) -> None:
    """Export in this process, and print the seconds of the step that writes weights."""
    from deepseek_trt.export.exporter import ExportRequest, Reporter, export_bundle

    steps: list[tuple[str, float]] = []
    report = Reporter(step=lambda text, total: steps.append((text, time.perf_counter())))
    request = ExportRequest(checkpoint, out, by_reference=by_reference, allow_zeros=not by_reference)
    export_bundle(request, report)
    ends = [at for _, at in steps[1:]] + [time.perf_counter()]
    spent = {text: stop - start for (text, start), stop in zip(steps, ends, strict=True)}
    print(next((seconds for text, seconds in spent.items() if text.startswith("writing")), 0.0))


def export(what: str, checkpoint: Path, out: Path, by_reference: bool) -> Row:
    command = [sys.executable, __file__, "--child", str(checkpoint), str(out)]
    took = run_measured(command + (["--by-reference"] if by_reference else []))
    nodes = sum(count_nodes(out / f"{graph}.onnx") for graph in ("prefill", "decode"))
    return Row(f"export {what}", took.seconds, float(took.output), took.peak_mb, size_mb(out), nodes)


def command(what: str, bundle: Path, *words: str) -> Row:
    """A deepseek-trt command that adds files to the bundle."""
    before = size_mb(bundle)
    script = "from deepseek_trt.cli.main import main; main()"
    took = run_measured([sys.executable, "-c", script, *words, *(f"--sm={sm}" for sm in SMS)])
    return Row(f"{words[0]} {what}", took.seconds, 0, took.peak_mb, size_mb(bundle) - before, 0)


def size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def count_nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)


def copy_speed(checkpoint: Path, target: Path, total: int) -> float:
    """Bytes a second of cp, with what is in the page cache written to disk."""
    target.mkdir()
    begin = time.perf_counter()
    for shard in sorted(checkpoint.glob("*.safetensors")):
        subprocess.run(["cp", "--sparse=never", "--reflink=never", str(shard), str(target)], check=True)
        with (target / shard.name).open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return total / seconds


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="export-benchmark-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, layers: int | None, with_weights: bool) -> tuple[list[Row], list[str]]:
    rows, notes, sizes = [], [], {}
    for name in ("v2-lite", "v2"):
        sizes[name] = write_sparse(reduced(PUBLISHED[name], layers), folder / name)
        what, out = f"{name}, {sizes[name] / 1e9:.1f} GB, by reference", folder / f"{name}-out"
        rows.append(export(what, folder / name, out, by_reference=True))
        rows.append(command(what, out, "plugins", str(out)))
        rows.append(command(what, out, "build", str(out), "--weights", "shared"))
        print(*rows[-3:], sep="\n", file=sys.stderr)
    if with_weights:
        total = sizes["v2-lite"]
        copied = copy_speed(folder / "v2-lite", folder / "copied", total)
        what = f"v2-lite, {total / 1e9:.1f} GB, with weights"
        rows.append(export(what, folder / "v2-lite", folder / "weights-out", by_reference=False))
        shutil.rmtree(folder / "weights-out")
        speed = total / rows[-1].writing
        notes.append(
            f"Weights are written at {speed / 1e6:.0f} MB/s, cp with fsync of the same files at "
            f"{copied / 1e6:.0f} MB/s: {100 * speed / copied:.0f} %. The export hashes every byte (sha256)."
        )
        print(rows[-1], notes[-1], file=sys.stderr)
    return rows, notes


def table(rows: list[Row]) -> str:
    lines = ["| step | seconds | peak memory, MB | written, MB | nodes in both graphs |", "|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r.what} | {r.seconds:.1f} | {r.peak_mb:.0f} | {r.written_mb:,.1f} | {r.nodes or ''} |")
    return "\n".join(lines)


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)
    return f"machine: {os.cpu_count()} cores, {memory:.0f} GB; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-weights", action="store_true", help="skip what writes 31.4 GB twice")
    parser.add_argument("--layers", type=int, help="only so many decoder layers, to try it out")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--by-reference", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.by_reference)
        return
    with scratch(args.disk) as folder:
        rows, notes = measure(folder, args.layers, not args.without_weights)
    print("\n\n".join([table(rows), *notes, machine()]))


if __name__ == "__main__":
    main()
