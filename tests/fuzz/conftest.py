"""Campaigns of cases over the targets of fuzzing/table.py; `python tests/fuzz/run.py` runs them, too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def campaign() -> Callable[..., Any]:
    """campaign("header", range(100)): runs these cases; fails with a line for each finding that reruns it.

    Of every hundred cases one at least must be accepted: else the good files are no longer good.
    """
    from fuzzing.runner import RIGHT, run_cases
    from fuzzing.table import TARGETS

    def run(name: str, numbers: range) -> Any:
        tally = run_cases(TARGETS[name](), numbers)
        print(tally)
        assert not tally.findings, f"{tally}\n" + "\n".join(tally.findings)
        assert tally.cases == len(numbers)
        assert tally.counts[RIGHT] >= len(numbers) // 100
        return tally

    return run
