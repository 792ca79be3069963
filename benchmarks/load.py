"""How fast a bundle opens in ONNX Runtime, and what memory that takes: weights mapped, and copied where they fit.

    python benchmarks/load.py WORKDIR                    # V2-Lite's shapes (31.4 GB) and mid_model.py's
    python benchmarks/load.py WORKDIR --bundle BUNDLE [--threads 2] [--copied]

Bundles are made in WORKDIR where they are not there. Each way in a process of its own: seconds until the session is
there, until the first token, and for the second one, and the process's anonymous memory after that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MEASURED = ("open, s", "first token, s", "second token, s", "anonymous memory, MB")


def measure(bundle: Path, mapped: bool, threads: int) -> dict[str, float]:
    """Seconds and MB, in this process."""
    import numpy as np

    from deepseek_trt.engines.sessions.ort import OrtSession
    from deepseek_trt.export.bundle.folder import Bundle

    start = time.perf_counter()
    session = OrtSession(Bundle.open(bundle), 2, threads, mapped=mapped)
    times = {MEASURED[0]: time.perf_counter() - start}
    for position, name in enumerate(MEASURED[1:3]):
        start = time.perf_counter()
        one = np.ones(1, np.int32)
        session.decode(np.array([[5]]), one, np.array([position], np.int32), one[None])
        times[name] = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {**times, MEASURED[3]: int(status["RssAnon"].split()[0]) / 1e3}


def make_bundles(work: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name, bundle, and whether a copy of its weights fits any machine."""
    from make_checkpoint import PUBLISHED, write_sparse
    from mid_model import write_checkpoint

    lite, mid = work / "v2-lite", work / "checkpoint"
    if not lite.exists():
        write_sparse(PUBLISHED["v2-lite"], lite)
    write_checkpoint(mid)
    for checkpoint, bundle in (lite, work / "v2-lite-bundle"), (mid, work / "bundle"):
        if not bundle.exists():
            script = "from deepseek_trt.cli.main import main; main()"
            command = [sys.executable, "-c", script, "export", str(checkpoint), str(bundle), "--allow-zeros"]
            subprocess.run(command, check=True, stdout=sys.stderr)
    yield "V2-Lite's shapes, bfloat16, zeros", work / "v2-lite-bundle", False
    yield "mid_model.py, float32", work / "bundle", True


def rows(name: str, bundle: Path, threads: int, copied: bool) -> Iterator[str]:
    size = (bundle / "weights.safetensors").stat().st_size / 1e9
    for form in ("mapped", "copied") if copied else ("mapped",):
        command = [sys.executable, __file__, ".", "--bundle", str(bundle), "--threads", str(threads), "--child", form]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        yield f"| {name}, {size:.1f} GB | {form} | {' | '.join(f'{value:,.2f}' for value in found.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--bundle", type=Path, help="this one instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--copied", action="store_true", help="measure the copy, too: the weights must fit into memory")
    parser.add_argument("--child", choices=("mapped", "copied"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.bundle, given.child == "mapped", given.threads)))
        return
    bundles = [(given.bundle.name, given.bundle, given.copied)] if given.bundle else list(make_bundles(given.workdir))
    print(f"| bundle | weights | {' | '.join(MEASURED)} |\n{'|---' * (2 + len(MEASURED))}|")
    for name, bundle, copied in bundles:
        for row in rows(name, bundle, given.threads, copied):
            print(row, flush=True)
    print(f"\n{given.threads} threads, {os.cpu_count()} cores, {memory_gb():.0f} GB of memory.")


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


if __name__ == "__main__":
    main()
