"""The command line: scripts/gpu-check."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path

from gpu_check.items import Setting
from gpu_check.parts import PARTS, run_part
from gpu_check.places import PREPARED, ROOT, Prepared
from gpu_check.rows import Row, markdown, write_json

SECONDS = 480.0


def main(words: list[str]) -> int:
    """0 where nothing failed, 1 where something did."""
    options = _parser().parse_args(words)
    if options.prepare or options.pack:
        from gpu_check.pack import Request, pack
        from gpu_check.prepare import prepare

        prepared = Prepared(options.prepared)
        prepare(prepared, tuple(options.sm or (90,)))
        if options.pack:
            pack(prepared, Request(options.pack, options.parts, options.python))
        return 0
    seconds = options.seconds or SECONDS * (10 if options.rehearse else 1)
    return check(Setting(Prepared(options.prepared), options.rehearse), options.out, options.part, seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description="Check this machine's GPU in eight minutes.")
    parser.add_argument("--rehearse", action="store_true", help="run all of it on a CPU, with stand-ins at small sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-check", help="folder of the table and the JSON")
    parser.add_argument("--part", action="append", choices=[p.name for p in PARTS], help="this part alone; repeatable")
    parser.add_argument(
        "--seconds", type=float, help="the most that all may take (default 480; 10 times that with --rehearse)"
    )
    parser.add_argument("--prepared", type=Path, default=PREPARED, help="folder that --prepare fills")
    parser.add_argument(
        "--prepare", action="store_true", help="compile the libraries and export the demo; no GPU needed"
    )
    parser.add_argument(
        "--pack",
        type=Path,
        nargs="?",
        const=ROOT / "build" / "gpu-check.tar.xz",
        help="prepare, and put all that a bare machine needs into this file (default build/gpu-check.tar.xz)",
    )
    parser.add_argument(
        "--parts",
        type=size_of,
        metavar="SIZE",
        help="pack TensorRT-RTX, too, and cut the pack into FILE.00, FILE.01, ... of at most this, e.g. 64M",
    )
    parser.add_argument(
        "--python", default="3.12", help="that of the machine; 'none' packs no Python packages (default 3.12)"
    )
    parser.add_argument("--sm", type=int, action="append", help="chip to prepare for (default 90); repeatable")
    return parser


def size_of(text: str) -> int:
    """Bytes, from a number with K, M or G for their powers of 1024."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper())
    number = text[:-1] if unit else text
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give e.g. 64M")
    return int(number) * (unit or 1)


def check(setting: Setting, out: Path, only: list[str] | None, seconds: float) -> int:
    """Run the parts, then write gpu-check.md and gpu-check.json in `out` and print the table."""
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        for part in PARTS:
            if only and part.name not in only:
                continue
            left = start + seconds - time.monotonic()
            for row in run_part(part, setting, Path(work), left):
                rows.append(row)
                print(f"{row.part}: {row.what}: {row.result} {row.note}", file=sys.stderr, flush=True)
    failed = sum(row.result == "FAILED" for row in rows)
    took = time.monotonic() - start
    today = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    title = f"{'Rehearsal, no GPU' if setting.rehearsal else 'GPU check'}, {today}, {took:.0f} s"
    text = f"{title}: {_counts(rows)}.\n\n{markdown(rows)}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.md").write_text(text, encoding="utf-8")
    facts = {"rehearsal": setting.rehearsal, "date": today, "seconds": round(took, 1), "failed": failed}
    write_json(out / "gpu-check.json", rows, facts)
    print(text, end="")
    return int(failed > 0 or not any(row.result == "good" for row in rows))


def _counts(rows: list[Row]) -> str:
    results = [row.result for row in rows]
    return ", ".join(f"{results.count(name)} {name}" for name in ("good", "FAILED", "not run"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
