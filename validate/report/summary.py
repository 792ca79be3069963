"""The report in brief, for machines: the verdicts and the main numbers, without per-step detail."""

from __future__ import annotations

import dataclasses
from typing import Any

from deepseek_trt.export.json_text import plain_json
from deepseek_trt.validate.findings.bisect import Fault, place_of_weight
from deepseek_trt.validate.report.report import AccuracyReport, BackendReport

_TEXT = ("passed", "scored", "loss", "reference_loss", "perplexity", "reference_perplexity", "tolerance")


def summary(report: AccuracyReport) -> dict[str, Any]:
    """Plain JSON values; what a bundle has no numbers of is None or empty."""
    brief: dict[str, Any] = plain_json(
        {
            "schema_version": report.schema_version,
            "passed": report.passed,
            "independent": dataclasses.asdict(report.independent),
            "bundle": report.provenance.bundle,
            "dtype": report.dtype,
            "changed_weights": [named_weight(name) for name in report.changed_weights],
            "odd_weights": [odd.sentence for odd in report.odd_weights],
            "backends": [_backend(b) for b in report.backends],
        }
    )
    return brief


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
