"""Rows: what each check found, as one Markdown table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["good", "FAILED", "not run"]
# Names of figures, and how each is written.
FIGURES = {
    "error": "{:.2f}",  # of the tolerance
    "us": "{:.1f}",
    "model us": "{:.1f}",  # what gpu_model.py expects of this chip
    "GB/s": "{:.0f}",
    "of copy": "{:.0%}",
    "TFLOPS": "{:.1f}",
    "of matmul": "{:.0%}",
    "tokens/s": "{:.0f}",
}


@dataclass(frozen=True)
class Row:
    """One finding. `figures` by names of FIGURES; `error` is the largest, as a share of what is tolerated."""

    part: str
    what: str
    result: Result
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.figures) - set(FIGURES)
        if unknown:
            raise ValueError(f"no column for {sorted(unknown)}")


def markdown(rows: Iterable[Row]) -> str:
    """One table of all rows, without the columns that none of them fills."""
    rows = list(rows)
    used = [name for name in FIGURES if any(name in row.figures for row in rows)]
    lines = [("part", "what", "result", *used, "note"), ("---", "---", "---", *["---:"] * len(used), "---")]
    lines += [(row.part, row.what, row.result, *(_figure(row, name) for name in used), row.note) for row in rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _figure(row: Row, name: str) -> str:
    return FIGURES[name].format(row.figures[name]) if name in row.figures else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write_json(path: Path, rows: Iterable[Row], facts: Mapping[str, Any]) -> None:
    """`facts` of the run, and all rows."""
    whole = {"schema": 1, **facts, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
