"""benchmarks/chunk_cost.py: its chunks and its table, and that chunks are computed in their places; not the time."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import chunk_cost  # noqa: E402  benchmarks are scripts, not a package

from deepseek_trt.engines.generation.chunking.cost import PrefillCost  # noqa: E402


def test_a_prompts_chunks(demo_checkpoint, bundle_of):
    prompt = chunk_cost.Prompt(bundle_of(demo_checkpoint), 1024)
    chunks = chunk_cost.chunks_of(1024)
    assert chunks == [(512, 0), (512, 512), (128, 0), (64, 0), (128, 512), (64, 512)]
    assert all(prompt.seconds(chunk) > 0 for chunk in chunks)


def test_the_table_has_both_ratios():
    cost = PrefillCost(token=100, projection=0, expanded=1, absorbed=1)
    rows = chunk_cost.table({(512, 0): 0.02, (512, 512): 0.05}, cost).splitlines()[2:]
    assert rows == ["| 512 | 0 | 20.0 | 1.00 | 1.00 |", "| 512 | 512 | 50.0 | 2.50 | 2.44 |"]
