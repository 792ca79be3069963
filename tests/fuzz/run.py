"""Run cases of a fuzz target: one by its number, with all that is said of it, or many.

python tests/fuzz/run.py header 17
python tests/fuzz/run.py header --cases 10000 --first 0 --seconds 600
python tests/fuzz/run.py all --cases 1000
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("RUST_BACKTRACE", "0")

from fuzzing.runner import case, run_cases
from fuzzing.table import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("number", type=int, nargs="?", help="of the one case to run in this process")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--sentences", action="store_true", help="print what was refused, too")
    given = parser.parse_args()
    if given.number is not None:
        return _one(given.target, given.number)
    failed = 0
    for name in TARGETS if given.target == "all" else (given.target,):
        tally = run_cases(TARGETS[name](), range(given.first, given.first + given.cases), given.seconds)
        print(*tally.findings, tally, sep="\n", flush=True)
        failed += len(tally.findings)
    return int(failed > 0)


def _one(name: str, number: int) -> int:
    target = TARGETS[name]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        target.prepare(Path(place))
        kind, detail = case(target, number, Path(place))
    print(f"{kind}: {detail}")
    return int(kind not in ("refused", "accepted and right"))


if __name__ == "__main__":
    sys.exit(main())
