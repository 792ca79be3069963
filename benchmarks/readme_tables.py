"""README's tables, each made of a section of docs, so that they cannot say two things."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from section import ROOT

Rows = list[list[str]]
_LATENT_CONTEXTS = (128, 512, 2048, 8192)


@dataclass(frozen=True)
class Table:
    """file: of docs, relative to the checkout; head: the table's first line in README; rows: of the file's text."""

    file: str
    head: str
    rows: Callable[[str], Rows]

    def text(self) -> str:
        made = self.rows((ROOT / self.file).read_text(encoding="utf-8"))
        lines = [self.head, "|---" * (self.head.count("|") - 1) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in made)]) + "\n"

    def put(self, readme: str) -> str:
        """README with this table in place of the one that stands there."""
        return re.sub(rf"^{re.escape(self.head)}\n(?:\|.*\n)+", lambda _: self.text(), readme, flags=re.MULTILINE)


def _cells(text: str, after: str, until: str) -> Iterator[list[str]]:
    """The rows of the tables between two texts, without heads."""
    part = text.partition(after)[2].partition(until)[0]
    for line in part.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def accuracy_rows(text: str) -> Rows:
    """bundle, run by, computed in, logits, tolerance, top-1; torch itself is left out."""
    names = {"exported": "ONNX Runtime, as exported", "ort": "ONNX Runtime, compiled decode"}
    found = _cells(text, "<!-- python benchmarks/accuracy.py -->", "<!-- end -->")
    return [[c[0], names[c[1]], c[2], c[3], c[4], c[7]] for c in found if c[1] in names]


def speed_rows(text: str) -> Rows:
    """Medians with two threads at batch 1; both modes of llama.cpp in one row."""
    found = {cells[0]: cells for cells in _cells(text, "**2 threads**", "<!-- end -->")}
    points = [found[f"batch 1 at {context}"] for context in _LATENT_CONTEXTS]
    medians = [[re.match(r"\*\*(.*?)\*\*", cell)[1] for cell in point[2:6]] for point in points]  # type: ignore[index]
    transformers, exact, fast, ours = zip(*medians, strict=True)
    both = [f"{a} / {b}" for a, b in zip(exact, fast, strict=True)]
    return [["transformers", *transformers], ["llama.cpp, exact / fastest", *both], ["deepseek-trt", *ours]]


def size_rows(text: str) -> Rows:
    return list(_cells(text, "<!-- python benchmarks/sizes.py -->", "<!-- end -->"))[1:]


TABLES = (
    Table("docs/narrow.md", "| model | parameters | as published | whole | fp8 | int8 | int4 |", size_rows),
    Table("docs/accuracy.md", "| bundle | run by | computed in | logits | tolerance | top-1 |", accuracy_rows),
    Table("docs/performance.md", "| ms per token at context | 128 | 512 | 2048 | 8192 |", speed_rows),
)
