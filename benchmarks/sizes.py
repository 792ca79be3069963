"""Sizes of the published models with whole and with narrow weights, as `deepseek-trt check` counts them.

    python benchmarks/sizes.py [v2-lite v2 ...]

Each is a sparse checkpoint with the published names and shapes: takes no disk, and nothing is exported.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from make_checkpoint import PUBLISHED, write_sparse

from deepseek_trt.export.survey import Facts, survey

MODELS = {"v2-lite": "DeepSeek-V2-Lite", "v2": "DeepSeek-V2", "v3": "DeepSeek-V3, R1"}
WAYS = ("none", "fp8", "int8", "int4")


def facts(checkpoint: Path, quantize: str) -> Facts:
    found = survey(checkpoint, quantize=quantize)
    if found.facts is None:
        raise SystemExit(f"{checkpoint}: {found.problem or found.unsupported}")
    return found.facts


def row(model: str, folder: Path) -> str:
    checkpoint = folder / model
    write_sparse(PUBLISHED[model], checkpoint)
    found = [facts(checkpoint, way) for way in WAYS]
    sizes = (f"{one.needs[0].disk / 1e9:,.1f} GB" for one in found)
    parameters = f"{found[0].parameters / 1e9:,.1f}e9"
    return (
        f"| {MODELS.get(model, model)} | {parameters} | {found[0].stored_bytes / 1e9:,.1f} GB | {' | '.join(sizes)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(PUBLISHED)}")
    given = parser.parse_args()
    print("| model | parameters | as published | whole | fp8 | int8 | int4 |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for model in given.models or MODELS:
            print(row(model, Path(name)))


if __name__ == "__main__":
    main()
