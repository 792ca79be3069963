"""HeadsReport: the accuracy report of a bundle that does not generate, as JSON, as a page and in brief."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deepseek_trt.export.bundle.interface import Interface
from deepseek_trt.export.config import ModelConfig
from deepseek_trt.export.errors import OutputError
from deepseek_trt.validate.report.files import REPORT_FILE, Comparison
from deepseek_trt.validate.report.html import HTML_FILE
from deepseek_trt.validate.report.provenance import Provenance
from deepseek_trt.validate.report.report import OutputReport, plain_json

SCHEMA_VERSION = 1
_COLUMNS = ("output", "error", "tolerance", "ulps", "worst at")


@dataclass(frozen=True)
class HeadsBackend:
    """One backend against torch in float32, output by output."""

    backend: str
    computed_in: str
    note: str
    passed: bool
    outputs: tuple[OutputReport, ...]


@dataclass(frozen=True)
class HeadsReport:
    """The whole report; `interface` says what the bundle's graphs take and give."""

    passed: bool
    interface: Interface
    model: ModelConfig
    dtype: str
    changed_weights: tuple[str, ...]
    changed_files: tuple[str, ...]
    cases: dict[str, str]
    backends: tuple[HeadsBackend, ...]
    provenance: Provenance
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; nan and the infinities as strings, as JSON has none."""
        plain: dict[str, Any] = plain_json(dataclasses.asdict(self))
        return plain


def print_heads(report: HeadsReport, console: Console | None = None) -> None:
    """Print a table a backend on stdout, then the verdict."""
    console = console or Console(soft_wrap=True)
    for backend in report.backends:
        title = f"{backend.backend}, computed in {backend.computed_in}, against torch in float32"
        table = Table(*_COLUMNS, title=title, title_justify="left", box=SIMPLE_HEAD)
        for output in backend.outputs:
            table.add_row(*_cells(output), style=None if output.passed else "red")
        console.print(table)
        if backend.note:
            console.print(backend.note, highlight=False)
    for name in report.changed_weights:
        console.print(f"[red]weight {name} is not what export wrote (sha256 differs)", highlight=False)
    console.print("[green]passed" if report.passed else "[red]failed", highlight=False)


def write_heads(report: HeadsReport, pairs: Sequence[Comparison], folder: Path) -> None:
    """report.json, report.html and Polygraphy's results of each backend."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
        (folder / HTML_FILE).write_text(_page(report), encoding="utf-8")
        for pair in pairs:
            pair.accuracy.save(str(folder / f"{pair.backend}.polygraphy.json"))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None


def _cells(output: OutputReport) -> tuple[str, ...]:
    worst = output.worst
    numbers = (f"{output.max_relative:.2e}", f"{output.tolerance:.2e}", f"{output.median_ulps:.2g}")
    return (output.output, *numbers, f"{worst.step}, row {worst.row} at {worst.position}")


def _page(report: HeadsReport) -> str:
    """One file that needs no network."""
    name, verdict = html.escape(report.provenance.bundle), "passed" if report.passed else "failed"
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>Accuracy of {name}</title>",
        "<style>body{font:15px/1.5 system-ui;max-width:60rem;margin:1rem auto}td,th{padding:.2rem .7rem;"
        "text-align:left}.failed{color:#c02f37}.passed{color:#1f7a43}</style>",
        f'<h1>Accuracy of {name}: <span class="{verdict}">{verdict}</span></h1>',
        f"<p>{report.interface.task}, {report.dtype} weights, against torch in float32. Inputs: "
        + html.escape("; ".join(f"{case} ({source})" for case, source in report.cases.items()))
        + ".</p>",
    ]
    for backend in report.backends:
        parts.append(f"<h2>{backend.backend}, computed in {backend.computed_in}</h2><p>{html.escape(backend.note)}</p>")
        rows = [f"<tr>{''.join(f'<th>{column}</th>' for column in _COLUMNS)}</tr>"]
        for output in backend.outputs:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(output))
            rows.append(f'<tr class="{"passed" if output.passed else "failed"}">{cells}</tr>')
        parts.append(f"<table>{''.join(rows)}</table>")
    return "\n".join(parts) + "\n"
