"""The report in brief, for machines: the verdicts and the main numbers, without per-step detail."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from deepseek_trt.export.json_text import plain_json
from deepseek_trt.validate.findings.bisect import Fault, place_of_weight
from deepseek_trt.validate.findings.narrowing import Narrowing
from deepseek_trt.validate.report.digits import apart
from deepseek_trt.validate.report.provenance import CheckpointFile
from deepseek_trt.validate.report.report import AccuracyReport, BackendReport, Change, Margin, Scope

MOST_FILES = 4  # of a checkpoint that are shown
_TEXT = ("passed", "scored", "loss", "reference_loss", "perplexity", "reference_perplexity", "tolerance")


def summary(report: AccuracyReport) -> dict[str, Any]:
    """Plain JSON values; what a bundle has no numbers of is None or empty."""
    brief: dict[str, Any] = plain_json(
        {
            "schema_version": report.schema_version,
            "passed": report.passed,
            "scope": dataclasses.asdict(report.scope),
            "independent": dataclasses.asdict(report.independent),
            "bundle": report.provenance.bundle,
            "dtype": report.dtype,
            "changed_weights": [named_weight(name) for name in report.changed_weights],
            "odd_weights": [odd.sentence for odd in report.odd_weights],
            "narrowing": _narrowing(report.narrowing),
            "changes": [dataclasses.asdict(c) for c in report.moved.changes] if report.moved else [],
            "unmatched": list(report.moved.unmatched) if report.moved else [],
            "backends": [_backend(b) for b in report.backends],
        }
    )
    return brief


def _narrowing(n: Narrowing | None) -> dict[str, Any] | None:
    """Without the layers."""
    if n is None:
        return None
    numbers = {name: value for name, value in dataclasses.asdict(n).items() if name != "layers"}
    return {**numbers, "perplexity_increase": n.perplexity_increase, "too_much": list(n.too_much)}


def covered(report: AccuracyReport) -> list[tuple[str, str]]:
    """What the verdict covers, a name and a sentence each, as it stands in a report's first box."""
    s, independent = report.scope, report.independent
    by = {"agrees": f"{independent.by} agrees with the reference", "differs": f"{independent.by} DIFFERS"}
    rows = [
        ("Layers compared", f"{s.layers} of {s.layers_of}"),
        ("Backends run", "; ".join(f"{b.backend} ({b.note})" if b.note else b.backend for b in report.backends)),
        ("Not compared", "; ".join(s.not_compared)),
        ("Experts reached", _experts(s)),
        ("Tokens compared", _tokens(s.tokens)),
        ("Margin", _margin(s.margin)),
        ("Reference", f"torch, {report.reference}"),
        ("Checkpoint", f"{s.checkpoint}: {_files(s.checkpoint_files)}"),
        ("Independent check", by.get(independent.status, independent.summary)),
        ("Cost of narrow numbers", report.narrowing.sentence if report.narrowing else ""),
        ("Machine", s.machine),
        ("Tool", s.tool),
    ]
    return [(name, text) for name, text in rows if text]


def _experts(s: Scope) -> str:
    if not s.experts_of:
        return ""
    return f"not seen, of {s.experts_of} in all layers" if s.experts is None else f"{s.experts} of {s.experts_of}"


def _tokens(tokens: dict[str, int]) -> str:
    if len(set(tokens.values())) == 1:
        return f"{next(iter(tokens.values()))}"
    return ", ".join(f"{backend} {count}" for backend, count in tokens.items())


def _margin(m: Margin) -> str:
    return f"the largest error is {m.share:.1%} of its tolerance ({m.backend}, {m.output})"


def _files(files: Sequence[CheckpointFile]) -> str:
    shown = [_file(file) for file in files[:MOST_FILES]]
    more = [f"and {len(files) - MOST_FILES} more, in report.json"] if len(files) > MOST_FILES else []
    return ", ".join([*shown, *more])


def _file(file: CheckpointFile) -> str:
    if file.sha256:
        return f"{file.name} sha256 {file.sha256[:12]}"
    when = datetime.fromtimestamp(file.mtime_ns / 1e9, timezone.utc).isoformat(timespec="seconds")
    return f"{file.name} not hashed ({file.size} bytes of {when})"


def named_change(c: Change) -> str:
    old, new = apart(float(c.old), float(c.new))
    return f"{'WORSE' if c.worse else 'moved'}: {c.backend}, {c.what}: {old} -> {new}"


def named_weight(weight: str) -> str:
    """A graph tensor's name, and what is computed with it in which layer."""
    layer, op = place_of_weight(weight)
    return f"{weight} ({op}{'' if layer is None else f' in layer {layer}'})"


def named_fault(f: Fault) -> str:
    where = "" if f.layer is None else f" in layer {f.layer}"
    numbers = f"{f.max_relative:.2e} against {f.tolerance:.2e}"
    return f"{f.op}{where} ({f.place}), {f.step}, row {f.row}, position {f.position}: {numbers}"


def _backend(b: BackendReport) -> dict[str, Any]:
    worst = max(b.outputs, key=lambda o: o.nearness)
    return {
        "backend": b.backend,
        "passed": b.passed,
        "computed_in": b.computed_in,
        "outputs": {
            o.output: {"max_relative": o.max_relative, "tolerance": o.tolerance, "reason": o.reason} for o in b.outputs
        },
        "first_fault": named_fault(b.first_fault) if b.first_fault else None,
        "worst": {"output": worst.output, "step": worst.worst.step, "row": worst.worst.row},
        "top1": b.tokens.top1 if b.tokens else None,
        "kl_max": b.tokens.kl_max if b.tokens else None,
        "text": {name: getattr(b.text, name) for name in _TEXT} if b.text else None,
        "greedy": [{"agreed": g.agreed, "tokens": g.tokens} for g in b.greedy],
        "near_ties": sum(f.near_tie for f in b.flips),
        "wrong_choices": sum(not f.near_tie for f in b.flips),
    }
