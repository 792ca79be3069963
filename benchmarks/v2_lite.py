"""V2-Lite's shapes with random numbers, narrowed and run on this machine: what exporting and generating take.

    python benchmarks/v2_lite.py WORKDIR              # 31 GB of disk, and 10 to 17 GB for a bundle at a time
    python benchmarks/v2_lite.py WORKDIR --forms int4 --threads 1 2

The checkpoint is made where it is not there. Each row is a process of its own; a bundle is removed after its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from make_checkpoint import PUBLISHED, fill_random, write_sparse
from process import Took, run_measured

MODEL, LAYERS = "v2-lite", 27
PROMPT, ANSWER = 128, 64  # tokens
HEAD = "| bundle | weights | threads | open, s | prompt of 128, s | tokens/s | peak memory, MB | of it anonymous |"


def generate(bundle: Path, mapped: bool, threads: int) -> dict[str, float]:
    """Seconds to open and for the prompt, the median's tokens/s, and anonymous memory in MB, in this process."""
    import numpy as np

    from deepseek_trt.engines.sessions.ort import OrtSession
    from deepseek_trt.export.bundle.folder import Bundle

    begin = time.perf_counter()
    opened = Bundle.open(bundle)
    count = opened.manifest.cache.pages_for(PROMPT + ANSWER)
    session = OrtSession(opened, 1 + count, threads, mapped=mapped)
    found = {"open": time.perf_counter() - begin}
    table = np.arange(1, 1 + count, dtype=np.int32)[None]
    ids = np.random.default_rng(0).integers(0, opened.manifest.model.vocab_size, (1, PROMPT))
    begin = time.perf_counter()
    logits = session.prefill(ids, np.int32([PROMPT]), np.int32([0]), table)
    found["prompt"] = time.perf_counter() - begin
    times = []
    for past in range(PROMPT, PROMPT + ANSWER):
        token = logits.reshape(1, -1, logits.shape[-1])[:, -1].argmax(-1)[None]
        begin = time.perf_counter()
        logits = session.decode(token, np.int32([1]), np.int32([past]), table)
        times.append(time.perf_counter() - begin)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {**found, "tokens": 1 / float(np.median(times)), "anonymous": int(status["RssAnon"].split()[0]) / 1e3}


def checkpoint(work: Path) -> Path:
    folder, made = work / "v2-lite-random", work / "v2-lite-random.made"
    if not made.exists():
        write_sparse(PUBLISHED[MODEL], folder)
        fill_random(folder, range(LAYERS))
        made.touch()
    return folder


def exported(source: Path, form: str, bundle: Path) -> Took:
    shutil.rmtree(bundle, ignore_errors=True)
    script = "from deepseek_trt.cli.main import main; main()"
    return run_measured(
        [sys.executable, "-c", script, "--quiet", "export", str(source), str(bundle), "--quantize", form]
    )


def rows(form: str, bundle: Path, threads: list[int]) -> Iterator[str]:
    size = (bundle / "weights.safetensors").stat().st_size / 1e9
    for way in ("mapped", "copied"):
        for count in threads:
            os.environ["OMP_NUM_THREADS"] = str(count)
            took = run_measured([sys.executable, __file__, ".", "--child", str(bundle), way, str(count)])
            found = json.loads(took.output.splitlines()[-1])
            cells = f"{found['open']:.1f} | {found['prompt']:.1f} | {found['tokens']:.1f} | {took.peak_mb:,.0f}"
            yield f"| {form}, {size:.1f} GB | {way} | {count} | {cells} | {found['anonymous']:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--forms", nargs="+", default=["int4"], choices=("int4", "int8", "fp8"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        bundle, way, count = given.child
        print(json.dumps(generate(Path(bundle), way == "mapped", int(count))))
        return
    source = checkpoint(given.workdir)
    stored = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e6
    said, measured = [], []
    for form in given.forms:
        bundle = given.workdir / f"v2-lite-{form}"
        took = exported(source, form, bundle)
        said.append(
            f"`export --quantize {form}` of the {stored / 1e3:.1f} GB took {took.seconds:,.0f} s "
            f"({stored / took.seconds:,.0f} MB/s) and {took.peak_mb:,.0f} MB of memory."
        )
        measured += list(rows(form, bundle, given.threads))
        shutil.rmtree(bundle)
    print("\n".join((HEAD, "|---" * HEAD.count(" |") + "|", *measured, "", *said)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    print(f"\n{os.cpu_count()} cores, {memory:.0f} GB of memory.")


if __name__ == "__main__":
    main()
