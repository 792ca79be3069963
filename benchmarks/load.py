"""How fast a bundle opens in ONNX Runtime, and what memory that takes: weights mapped, and copied where they fit.

    python benchmarks/load.py BUNDLE [--threads 2] [--copied]

Each in a process of its own: seconds until the session is there, until the first token, and for the second one, and the
process's anonymous memory after that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def measure(bundle: Path, mapped: bool, threads: int) -> dict[str, float]:
    """Seconds and MB, in this process."""
    import numpy as np

    from deepseek_trt.engines.sessions.ort import OrtSession
    from deepseek_trt.export.bundle.folder import Bundle

    start = time.perf_counter()
    session = OrtSession(Bundle.open(bundle), 2, threads, mapped=mapped)
    times = {"open, s": time.perf_counter() - start}
    for position, name in enumerate(("first token, s", "second token, s")):
        start = time.perf_counter()
        session.decode(np.array([[5]]), np.array([position], np.int32), np.array([[1]], np.int32))
        times[name] = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {**times, "anonymous memory, MB": int(status["RssAnon"].split()[0]) / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--copied", action="store_true", help="measure the copy, too: the weights must fit into memory")
    parser.add_argument("--child", choices=("mapped", "copied"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.bundle, given.child == "mapped", given.threads)))
        return
    for form in ("mapped", "copied") if given.copied else ("mapped",):
        command = [sys.executable, __file__, str(given.bundle), "--threads", str(given.threads), "--child", form]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {form} | " + " | ".join(f"{name} {value:.2f}" for name, value in found.items()) + " |")


if __name__ == "__main__":
    main()
