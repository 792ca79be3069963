"""The tables that benchmarks/cpu.py prints, of made results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu
import cpu_table
from cpu_plan import EXPORTS, PLANS


def args_of(table):
    return argparse.Namespace(
        table=table, threads=[1, 2], rounds=PLANS[table].rounds, only=list(PLANS[table].runners), llama_python=None
    )


def result(cell):
    """The peers take 30 ms, ours 10."""
    quality = {"kl": 0.25, "top1": 0.5} if cell.point.kind == "quality" else {}
    beside = {"wait_ms": 7.0} if cell.point.kind == "beside" else {}
    taken = [] if quality else [10.0 if cell.runner.startswith("ours") else 30.0] * 3
    return {"ms": taken, "error": 0.5, "at": "2000-01-01 00:00", "grown_mb": 5.0, **quality, **beside}


@pytest.mark.parametrize("table", PLANS)
def test_every_cell_is_in_the_table(table):
    plan, args = PLANS[table], args_of(table)
    cells = list(cpu.cells(args))
    assert len({cell.key for cell in cells}) == len(cells)
    text = cpu_table.markdown({cell.key: result(cell) for cell in cells}, plan, args)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for point in plan.points(1):
        assert sum(line.startswith(f"| {point.name}") for line in rows) == (1 if point.kind == "quality" else 2)
    for line in rows:
        if line.startswith(("| batch", "| prefill")):
            assert line.count("3.00") == len(plan.pairs)
    assert ("waits of 7" in text) == (table == "long")
    assert ("| deepseek-trt int4 | 0.25000 | 50.0% |" in text) == (table == "narrow")


def test_narrow_floors_are_of_narrow_bytes():
    whole, int8, int4, all4 = (cpu_table.weight_bytes(1, form) for form in EXPORTS)
    assert whole > int8 > int4 > all4 > whole / 9
