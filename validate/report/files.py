"""The report's folder: report.json, report.html, and Polygraphy's results of each backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deepseek_trt.export.errors import OutputError
from deepseek_trt.export.writing.working import write_text
from deepseek_trt.validate.report.html import HTML_FILE, render_html
from deepseek_trt.validate.report.report import AccuracyReport, Comparison

REPORT_FILE = "report.json"


def write_report(report: AccuracyReport, comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write all files, each under a temporary name first; files of an earlier report are replaced."""
    make_folder(folder)
    try:
        write_text(folder / REPORT_FILE, report.to_json())
        write_text(folder / HTML_FILE, render_html(report))
        for comparison in comparisons:
            comparison.accuracy.save(str(folder / f"{comparison.backend}.polygraphy.json"))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None


def make_folder(folder: Path) -> None:
    """Make the report's folder and its parents; OutputError where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None
    if not writable:
        raise OutputError(f"cannot write {folder}: name a folder that you may write")
