"""An accuracy report on stdout, for people: a table a backend, what to know about it, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepseek_trt.validate.findings.baseline import Change
from deepseek_trt.validate.findings.text_score import TextScore
from deepseek_trt.validate.report.report import AccuracyReport, BackendReport, OutputReport
from deepseek_trt.validate.report.summary import named_fault, named_weight

MOST_OF_LAYERS = 8


def print_report(report: AccuracyReport, changes: Sequence[Change] | None = None) -> None:
    """Print the report, and where there are `changes`, what moved since an earlier one."""
    console = Console(soft_wrap=True)
    colour = {"agrees": "green", "differs": "red", "absent": "yellow"}[report.independent.status]
    console.print(f"[{colour}]{escape(report.independent.summary)}", highlight=False)
    for backend in report.backends:
        console.print(_table(backend))
        for line in _sentences(backend):
            console.print(line, highlight=False)
    for line in [*_verdicts(report), *(_moves(changes) if changes is not None else ())]:
        console.print(line, highlight=False)


def _verdicts(report: AccuracyReport) -> Iterator[str]:
    for part in report.parts:
        failed = ", ".join(name for name, passed in part.passed.items() if not passed)
        yield f"[red]{part.part}: failed ({failed})" if failed else f"{part.part}: passed"
    for name in report.changed_weights:
        yield f"[red]weight {named_weight(name)} is not what export wrote (sha256 differs)"
    for odd in report.odd_weights:
        yield f"[red]{odd.sentence}"
    for name in report.changed_files:
        yield f"[yellow]{name} has changed since export"
    yield "[green]passed" if report.passed else "[red]failed"


def _moves(changes: Sequence[Change]) -> Iterator[str]:
    for c in changes:
        verdict = "[red]worse" if c.worse else "moved"
        yield f"{verdict}: {c.backend}, {c.what}: {c.old:.6g} -> {c.new:.6g}"
    if not changes:
        yield "nothing moved since the earlier report"


def _table(b: BackendReport) -> Table:
    title = f"{b.backend}, computed in {b.computed_in}, against torch in float32"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("output", "error", "tolerance", "ulps", "worst at"):
        table.add_column(name, justify="left" if name in ("output", "worst at") else "right")
    for o in _shown(b):
        place = f"{o.worst.step}, row {o.worst.row} at {o.worst.position}"
        numbers = (o.error, f"{o.tolerance:.2e}", f"{o.median_ulps:.2g}" if not o.reason else "")
        table.add_row(o.output, *numbers, place, style=None if o.passed else "red")
    return table


def _shown(b: BackendReport) -> list[OutputReport]:
    """The model's outputs, every one out of tolerance, and of the layers' ("latents.3") those nearest to theirs."""
    layers = sorted((o for o in b.outputs if o.passed and "." in o.output), key=lambda o: -o.nearness)
    return [o for o in b.outputs if o not in layers or o in layers[:MOST_OF_LAYERS]]


def _sentences(b: BackendReport) -> Iterator[str]:
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
        yield "; ".join([*parts, *([b.note] if b.note else [])])
    if b.first_fault is not None:
        yield f"[red]first out of tolerance: {named_fault(b.first_fault)}"
    if b.text is not None:
        yield _perplexity(b.text)


def _perplexity(t: TextScore) -> str:
    difference, move = t.perplexity - t.reference_perplexity, t.loss - t.reference_loss
    line = f"perplexity {t.perplexity:.4f} ({difference:+.2e}) over {t.scored} tokens of text; loss {t.loss:.6f} nats"
    return f"{'' if t.passed else '[red]'}{line} ({move:+.2e}, tolerance {t.tolerance:.2e})"
