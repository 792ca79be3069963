"""The forms of a mixture of experts that a table compares compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import moe_forms


def test_forms_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    moe_forms.table(moe_forms.Sizes(hidden=64, inner=32, experts=8, top_k=2), 1, [1, 5], 0.01)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == list(moe_forms.FORMS)
    assert all(float(row[-2]) < 1e-5 for row in rows)
