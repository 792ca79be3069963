"""Sizes of the published models with whole and with narrow weights, as `deepseek-trt check` counts them.

    python benchmarks/sizes.py [v2-lite v2 ...]
    python benchmarks/sizes.py --cache

The second counts the cache, whole and narrow, beside int4 weights in the memory of a card, or of several together.
Each is a sparse checkpoint with the published names and shapes: takes no disk, and nothing is exported.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from make_checkpoint import PUBLISHED, write_sparse

from deepseek_trt.export.survey import GIB, Facts, survey

MODELS = {"v2-lite": "DeepSeek-V2-Lite", "v2": "DeepSeek-V2", "v3": "DeepSeek-V3, R1"}
WAYS = ("none", "fp8", "int8", "int4")
CARDS = {"v2-lite": 24, "v2": 192, "v3": 640}  # GiB


def facts(checkpoint: Path, quantize: str, gpu_bytes: int = GIB, cache_dtype: str | None = None) -> Facts:
    found = survey(checkpoint, quantize=quantize, gpu_bytes=gpu_bytes, cache_dtype=cache_dtype)
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


def cache_row(model: str, folder: Path) -> str:
    checkpoint, card = folder / model, CARDS[model]
    write_sparse(PUBLISHED[model], checkpoint)
    whole, narrow = (facts(checkpoint, "int4", card * GIB, cache) for cache in (None, "int8"))
    tokens = f"{card} GiB | {whole.context_tokens:,} | {narrow.context_tokens:,}"
    return f"| {MODELS[model]} | {whole.cache_bytes_per_token:,} | {narrow.cache_bytes_per_token:,} | {tokens} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(PUBLISHED)}")
    parser.add_argument("--cache", action="store_true", help=f"of {', '.join(CARDS)}: the cache in a card's memory")
    given = parser.parse_args()
    if given.cache:
        print("| model | bytes a token, bfloat16 | int8 or fp8 | memory | tokens, bfloat16 | int8 or fp8 |")
        print("|---|---|---|---|---|---|")
    else:
        print("| model | parameters | as published | whole | fp8 | int8 | int4 |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for model in given.models or MODELS:
            print((cache_row if given.cache else row)(model, Path(name)))


if __name__ == "__main__":
    main()
