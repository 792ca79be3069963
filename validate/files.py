"""The report's folder: report.json, report.html, and Polygraphy's results of each backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from polygraphy.comparator import AccuracyResults

from deepseek_trt.export.errors import OutputError
from deepseek_trt.validate.html import HTML_FILE, render_html
from deepseek_trt.validate.report import AccuracyReport

REPORT_FILE = "report.json"


class Comparison(Protocol):
    """Polygraphy's verdicts on one backend."""

    @property
    def backend(self) -> str: ...

    @property
    def accuracy(self) -> AccuracyResults: ...


def write_report(report: AccuracyReport, pairs: Sequence[Comparison], folder: Path) -> None:
    """Write all files, each under a temporary name first; files of an earlier report are replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / REPORT_FILE, report.to_json())
        _write(folder / HTML_FILE, render_html(report))
        for pair in pairs:
            pair.accuracy.save(str(folder / f"{pair.backend}.polygraphy.json"))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)
