"""The report in brief: a table for people, a dict for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deepseek_trt.validate.findings.baseline import Change
from deepseek_trt.validate.findings.bisect import Fault, place_of_weight
from deepseek_trt.validate.findings.text_score import TextScore
from deepseek_trt.validate.report.report import AccuracyReport, BackendReport, OutputReport

MOST_LATENTS = 8


def summary(report: AccuracyReport) -> dict[str, Any]:
    """The verdicts and the main numbers, without per-step detail."""
    return {
        "schema_version": report.schema_version,
        "passed": report.passed,
        "bundle": report.provenance.bundle,
        "dtype": report.dtype,
        "changed_weights": [_changed(name) for name in report.changed_weights],
        "backends": [_backend(b) for b in report.backends],
    }


def print_summary(report: AccuracyReport, console: Console | None = None) -> None:
    """Print a table a backend on stdout, then the verdict."""
    console = console or Console(soft_wrap=True)
    for backend in report.backends:
        console.print(_table(backend))
        console.print(_sentence(backend), highlight=False)
        if backend.first_fault is not None:
            console.print(f"[red]first out of tolerance: {_fault(backend.first_fault)}", highlight=False)
        if backend.text is not None:
            console.print(_perplexity(backend.text), highlight=False)
    for part in report.parts:
        failed = ", ".join(name for name, passed in part.passed.items() if not passed)
        console.print(f"[red]{part.part}: failed ({failed})" if failed else f"{part.part}: passed", highlight=False)
    for name in report.changed_weights:
        console.print(f"[red]weight {_changed(name)} is not what export wrote (sha256 differs)", highlight=False)
    for name in report.changed_files:
        console.print(f"[yellow]{name} has changed since export", highlight=False)
    console.print("[green]passed" if report.passed else "[red]failed", highlight=False)


def print_changes(changes: Sequence[Change], console: Console | None = None) -> None:
    """Print what moved since the earlier report."""
    console = console or Console(soft_wrap=True)
    for c in changes:
        verdict = "[red]worse" if c.worse else "moved"
        console.print(f"{verdict}: {c.backend}, {c.what}: {c.old:.6g} -> {c.new:.6g}", highlight=False)
    if not changes:
        console.print("nothing moved since the earlier report", highlight=False)


def _changed(weight: str) -> str:
    layer, op = place_of_weight(weight)
    return f"{weight} ({op}{'' if layer is None else f' in layer {layer}'})"


def _fault(f: Fault) -> str:
    where = "" if f.layer is None else f" in layer {f.layer}"
    numbers = f"{f.max_relative:.2e} against {f.tolerance:.2e}"
    return f"{f.op}{where} ({f.place}), {f.step}, row {f.row}, position {f.position}: {numbers}"


def _backend(b: BackendReport) -> dict[str, Any]:
    worst = _worst(b)
    return {
        "backend": b.backend,
        "passed": b.passed,
        "computed_in": b.computed_in,
        "outputs": {o.output: {"max_relative": _number(o.max_relative), "tolerance": o.tolerance} for o in b.outputs},
        "first_fault": _fault(b.first_fault) if b.first_fault else None,
        "worst": {"output": worst.output, "step": worst.worst.step, "row": worst.worst.row},
        "top1": b.tokens.top1,
        "kl_max": _number(b.tokens.kl_max),
        "text": _text(b.text) if b.text else None,
        "greedy": [{"agreed": g.agreed, "tokens": g.tokens} for g in b.greedy],
        "near_ties": sum(f.near_tie for f in b.flips),
        "wrong_choices": sum(not f.near_tie for f in b.flips),
    }


def _text(t: TextScore) -> dict[str, Any]:
    names = ("scored", "loss", "reference_loss", "perplexity", "reference_perplexity", "tolerance")
    return {"passed": t.passed, **{name: _number(getattr(t, name)) for name in names}}


def _number(x: float) -> float | str:
    return x if x == x and abs(x) != float("inf") else str(x)


def _worst(b: BackendReport) -> OutputReport:
    return max(b.outputs, key=_nearness)


def _nearness(o: OutputReport) -> float:
    return o.max_relative / o.tolerance


def _table(b: BackendReport) -> Table:
    title = f"{b.backend}, computed in {b.computed_in}, against torch in float32"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("output", "error", "tolerance", "ulps", "worst at"):
        table.add_column(name, justify="left" if name in ("output", "worst at") else "right")
    for o in _shown(b):
        place = f"{o.worst.step}, row {o.worst.row} at {o.worst.position}"
        numbers = (f"{o.max_relative:.2e}", f"{o.tolerance:.2e}", f"{o.median_ulps:.2g}")
        table.add_row(o.output, *numbers, place, style=None if o.passed else "red")
    return table


def _perplexity(t: TextScore) -> str:
    difference, move = t.perplexity - t.reference_perplexity, t.loss - t.reference_loss
    line = f"perplexity {t.perplexity:.4f} ({difference:+.2e}) over {t.scored} tokens of text; loss {t.loss:.6f} nats"
    return f"{'' if t.passed else '[red]'}{line} ({move:+.2e}, tolerance {t.tolerance:.2e})"


def _shown(b: BackendReport) -> list[OutputReport]:
    """The logits, every output out of tolerance, and of the layers' latents those nearest to their tolerance."""
    latents = sorted((o for o in b.outputs if o.passed and o.output != "logits"), key=lambda o: -_nearness(o))
    return [o for o in b.outputs if o.output == "logits" or not o.passed or o in latents[:MOST_LATENTS]]


def _sentence(b: BackendReport) -> str:
    ties = sum(f.near_tie for f in b.flips)
    parts = [f"top-1 {b.tokens.top1:.2%} and top-5 {b.tokens.top5:.2%} of {b.tokens.predictions} predictions agree"]
    parts.append(f"KL at most {b.tokens.kl_max:.2e}")
    if b.greedy:
        alike = ", ".join(str(g.agreed) for g in b.greedy)
        parts.append(f"greedy generation agrees for {alike} of {b.greedy[0].tokens} tokens")
    if b.routers:
        parts.append(f"router choices: {ties} near ties followed, {len(b.flips) - ties} wrong")
    if b.set_aside:
        parts.append(f"router choices unseen, {sum(b.set_aside.values())} lines set aside for near ties")
    return "; ".join(parts) + (f"; {b.note}" if b.note else "")
