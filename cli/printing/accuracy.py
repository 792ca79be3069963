"""An accuracy report on stdout, for people: a table a backend, what to know about it, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from deepseek_trt.cli.printing.output import print_rich
from deepseek_trt.export.text.wording import escaped
from deepseek_trt.validate.findings.text_score import TextScore
from deepseek_trt.validate.report.html import HTML_FILE
from deepseek_trt.validate.report.report import AccuracyReport, BackendReport, Moved, OutputReport
from deepseek_trt.validate.report.summary import covered, named_change, named_fault, named_weight

MOST_OF_LAYERS = 8


def print_report(report: AccuracyReport, folder: Path | None = None) -> None:
    """Print the report; last what it covers, where its files are (`folder`), and the verdict."""
    colour = {"agrees": "green", "differs": "red", "absent": "yellow"}[report.independent.status]
    parts: list[Table | Text] = [styled_line(report.independent.summary, colour)]
    for backend in report.backends:
        parts += [_table(backend), *_sentences(backend)]
    parts += [*_faults(report), *_moves(report.moved)]
    parts += [Text.assemble((escaped(name), "bold"), f": {escaped(text)}") for name, text in covered(report)]
    if folder is not None:
        parts.append(styled_line(f"report: {folder / HTML_FILE}"))
    parts.append(styled_line(report.verdict.lower(), "green" if report.is_good else "red"))
    print_rich(*parts)


def styled_line(text: str, style: str = "") -> Text:
    """One line, whatever stands in the names of it."""
    return Text(escaped(text), style)


def _faults(report: AccuracyReport) -> Iterator[Text]:
    for part in report.parts:
        failed = ", ".join(name for name, passed in part.passed.items() if not passed)
        yield (
            styled_line(f"FAIL {part.part}: failed ({failed})", "red")
            if failed
            else styled_line(f"{part.part}: passed")
        )
    for name in report.changed_weights:
        yield styled_line(f"FAIL weight {named_weight(name)} is not what export wrote (sha256 differs)", "red")
    for odd in report.odd_weights:
        yield styled_line(f"FAIL {odd.sentence}", "red")
    for name in report.changed_files:
        yield styled_line(f"{name} has changed since export", "yellow")


def _moves(moved: Moved | None) -> Iterator[Text]:
    if moved is None:
        return
    for change in moved.changes:
        yield styled_line(named_change(change), "red" if change.worse else "")
    yield from (styled_line(f"not compared with {moved.earlier}: {line}", "yellow") for line in moved.unmatched)
    if not moved.changes:
        yield styled_line(f"nothing moved since {moved.earlier}")


def _table(b: BackendReport) -> Table:
    title = f"{b.backend}, computed in {b.computed_in}, against torch in float32"
    table = Table(title=escaped(title), title_justify="left", box=SIMPLE_HEAD)
    for name in ("output", "", "error", "tolerance", "ulps", "worst at"):
        table.add_column(name, justify="left" if name in ("output", "", "worst at") else "right")
    for o in _shown(b):
        place = f"{o.worst.step}, row {o.worst.row} at {o.worst.position}"
        numbers = (o.error, f"{o.tolerance:.2e}", f"{o.median_ulps:.2g}" if not o.reason else "")
        table.add_row(
            escaped(o.output), "ok" if o.passed else "FAIL", *numbers, place, style=None if o.passed else "red"
        )
    return table


def _shown(b: BackendReport) -> list[OutputReport]:
    """The model's outputs, every one out of tolerance, and of the layers' ("latents.3") those nearest to theirs."""
    layers = sorted((o for o in b.outputs if o.passed and "." in o.output), key=lambda o: -o.nearness)
    return [o for o in b.outputs if o not in layers or o in layers[:MOST_OF_LAYERS]]


def _sentences(b: BackendReport) -> Iterator[Text]:
    """One of how the backend's tokens agree and what to know about it, its first fault, and the text's perplexity."""
    ties, parts = sum(f.near_tie for f in b.flips), []
    if b.tokens:
        alike = f"top-1 {b.tokens.top1:.2%} and top-5 {b.tokens.top5:.2%} of {b.tokens.predictions} predictions agree"
        parts += [alike, f"KL at most {b.tokens.kl_max:.2e}"]
    if b.greedy:
        counts = ", ".join(str(g.agreed) for g in b.greedy)
        parts.append(f"greedy generation agrees for {counts} of {b.greedy[0].tokens} tokens")
    if b.routers:
        parts.append(f"router choices: {ties} near ties followed, {len(b.flips) - ties} wrong")
    if b.set_aside:
        parts.append(f"router choices unseen, {sum(b.set_aside.values())} lines set aside for near ties")
    if parts or b.note:
        yield styled_line("; ".join([*parts, *([b.note] if b.note else [])]))
    if b.first_fault is not None:
        yield styled_line(f"FAIL first out of tolerance: {named_fault(b.first_fault)}", "red")
    if b.text is not None:
        yield _perplexity(b.text)


def _perplexity(t: TextScore) -> Text:
    difference, move = t.perplexity - t.reference_perplexity, t.loss - t.reference_loss
    line = f"perplexity {t.perplexity:.4f} ({difference:+.2e}) over {t.scored} tokens of text; loss {t.loss:.6f} nats"
    whole = f"{line} ({move:+.2e}, tolerance {t.tolerance:.2e})"
    return styled_line(whole) if t.passed else styled_line(f"FAIL {whole}", "red")
