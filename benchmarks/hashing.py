"""What checking hashes costs as a bundle is opened, beside this machine's own sha256 and reading, all in one run.

    python benchmarks/hashing.py            # needs 6 GB of disk

V2-Lite with two layers of random numbers (make_checkpoint.py), exported: 2 GB. Of each measurement the best of several
rounds counts, in which all take turns, as others may use the machine. "disk" is the file after the system was told to
forget it; where a host caches for the machine, that is faster than its disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from make_checkpoint import PUBLISHED, fill_random, reduced, write_sparse

from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.proof import prove_weights
from deepseek_trt.export.exporter import ExportRequest, export_bundle
from export import scratch

MEMORY_BYTES, PART = 2**30, 4 * 2**20  # hashed in memory; bytes at once
CACHE, DISK = "memory", "disk"  # where a file is read from


@dataclass(frozen=True)
class Work:
    """One measurement: what goes through `size` bytes on so many threads; `source` is where they come from.

    Kinds: "sha256" and "reading" are the machine's own, which "ours" is compared with.
    """

    kind: str
    what: str
    threads: int
    source: str
    size: int
    run: Callable[[], object]


def works(bundle: Bundle, folder: Path) -> Iterator[Work]:
    file = bundle.path / WEIGHTS_FILE
    size, most = file.stat().st_size, len(os.sched_getaffinity(0))
    counts = sorted({1, most})
    for n in counts:
        yield Work("sha256", "hashlib.sha256 over memory", n, "", MEMORY_BYTES * n, lambda n=n: hash_memory(n))
    yield Work("", "sha256sum of the weights", 1, CACHE, size, lambda: sha256sum(file))
    for source in (CACHE, DISK):
        for n in counts:
            yield Work("reading", "reading the weights", n, source, size, lambda n=n: read(file, n))
    for source in (CACHE, DISK):
        for n in counts:
            yield Work("ours", "first use of a bundle's weights", n, source, size, lambda n=n: prove(bundle, n))
    model = served(bundle, folder)
    for source in (CACHE, DISK):
        yield Work("ours", "load of a repository's model", 1, source, size, lambda: runpy.run_path(str(model)))


def hash_memory(threads: int) -> None:
    """Hash a buffer over and over, in each thread one of its own, which stays in the processor's cache."""

    def work(_: int) -> None:
        digest, part = hashlib.sha256(), bytes(PART)
        for _ in range(MEMORY_BYTES // PART):
            digest.update(part)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def sha256sum(file: Path) -> None:
    subprocess.run(["sha256sum", file], stdout=subprocess.DEVNULL, check=True)


def read(file: Path, threads: int) -> None:
    """Read the file into buffers, each thread a piece of it."""
    piece = -(-file.stat().st_size // threads)

    def work(number: int) -> None:
        buffer, at, end = bytearray(PART), number * piece, (number + 1) * piece
        while at < end and (count := os.preadv(descriptor, [memoryview(buffer)[: end - at]], at)):
            at += count

    with file.open("rb") as stream, ThreadPoolExecutor(threads) as pool:
        descriptor = stream.fileno()
        list(pool.map(work, range(threads)))


def prove(bundle: Bundle, threads: int) -> None:
    """Hash the weights as on their first use, on so many processors."""
    with processors(threads):
        prove_weights(bundle.path, bundle.manifest, anew=True)


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Leave this thread, and those that it starts, so many of them."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_of_them)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def served(bundle: Bundle, folder: Path) -> Path:
    """A script that checks what a repository's model.py checks before the runtime is loaded, of the weights alone."""
    folder.mkdir()
    os.link(bundle.path / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with (folder / WEIGHTS_FILE).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(stream.read())
    (folder / "manifest.json").write_text(json.dumps({"files": {WEIGHTS_FILE: digest.hexdigest()}}), encoding="utf-8")
    code = files("deepseek_trt.engines.model_repository").joinpath("files", "model.py").read_text(encoding="utf-8")
    (folder / "check.py").write_text(code[: code.index("\nsys.dont_write_bytecode")], encoding="utf-8")
    return folder / "check.py"


def forget(file: Path) -> None:
    """Have the system drop what it keeps of the file in memory."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speeds(todo: list[Work], file: Path, rounds: int) -> list[float]:
    """Bytes a second of each, the best of the rounds."""
    best = [0.0] * len(todo)
    for number in range(rounds):
        for index, work in enumerate(todo):
            if work.source == DISK:
                forget(file)
            elif work.source:
                read(file, 1)
            began = time.perf_counter()
            work.run()
            best[index] = max(best[index], work.size / (time.perf_counter() - began))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return best


def table(todo: list[Work], found: list[float]) -> str:
    own = {(w.kind, w.threads, w.source): speed for w, speed in zip(todo, found, strict=True) if w.kind != "ours"}
    lines = [
        "| | threads | from | MB/s | of sha256 over memory | of reading | of the slower of both |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, speed in zip(todo, found, strict=True):
        cells = [work.what, str(work.threads), work.source, f"{speed / 1e6:,.0f}", "", "", ""]
        if work.kind in ("ours", ""):
            ceilings = own["sha256", work.threads, ""], own["reading", work.threads, work.source]
            cells[4:] = [f"{100 * speed / ceiling:.0f} %" for ceiling in (*ceilings, min(ceilings))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def opening(bundle: Bundle, rounds: int) -> str:
    """What every opening costs, with weights that were proven before."""
    prove_weights(bundle.path, bundle.manifest)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        Bundle.open(bundle.path).prove_weights()
        seconds.append(time.perf_counter() - began)
    listed = [(bundle.path / name).stat().st_size for name in bundle.manifest.files]
    return (
        f"Every opening hashes graphs and texts ({len(listed)} files, {sum(listed) / 1e6:.1f} MB) and finds that the "
        f"weights are as they were: {1000 * min(seconds):.0f} ms."
    )


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", info)
    has = "with" if re.search(r"\bsha_ni\b", info) else "without"
    return f"{len(os.sched_getaffinity(0))} processors of {name[1] if name else 'no name'}, {has} SHA instructions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, help="only so many in each layer, to try it out")
    args = parser.parse_args()
    with scratch(args.disk) as folder:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        checkpoint = folder / "checkpoint"
        write_sparse(reduced(PUBLISHED["v2-lite"], layers=2, experts=args.experts), checkpoint)
        fill_random(checkpoint, {0, 1})
        bundle = export_bundle(ExportRequest(checkpoint, folder / "bundle")).bundle
        todo = list(works(bundle, folder / "served"))
        found = speeds(todo, bundle.path / WEIGHTS_FILE, args.rounds)
        print(f"{table(todo, found)}\n\n{opening(bundle, args.rounds)}\n\n{todo[-1].size / 1e9:.1f} GB; {machine()}.")


if __name__ == "__main__":
    main()
