"""From the reports of all parts to one BackendReport of the model."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

from polygraphy.comparator import AccuracyResult, AccuracyResults

from deepseek_trt.validate.report.report import BackendReport, Comparison


def merge(reports: Sequence[BackendReport]) -> BackendReport:
    """The report of all parts, in their order; the last is the head's, which alone knows of logits and tokens."""
    return dataclasses.replace(
        reports[-1],
        passed=all(report.passed for report in reports),
        note="; ".join(dict.fromkeys(r.note for r in reports if r.note)),
        follows_routing=all(r.follows_routing for r in reports),
        set_aside={name: lines for r in reports for name, lines in r.set_aside.items()},
        first_fault=next((r.first_fault for r in reports if r.first_fault is not None), None),
        milliseconds=_summed([r.milliseconds for r in reports]),
        reference_milliseconds=_summed([r.reference_milliseconds for r in reports]),
        outputs=tuple(x for r in reports for x in r.outputs),
        drift=tuple(x for r in reports for x in r.drift),
        routers=tuple(x for r in reports for x in r.routers),
        flips=tuple(x for r in reports for x in r.flips),
        coverage=tuple(x for r in reports for x in r.coverage),
    )


def _summed(times: Sequence[dict[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """All parts' milliseconds of each step, by graph."""
    steps = {graph: zip(*(part[graph] for part in times), strict=True) for graph in times[0]}
    return {graph: tuple(round(sum(step), 3) for step in found) for graph, found in steps.items()}


def merge_accuracy(comparisons: Sequence[Comparison]) -> Comparison:
    """Each step's outputs of all parts side by side."""
    runners = next(iter(comparisons[0].accuracy[0]))
    steps = zip(*(c.accuracy[0][runners] for c in comparisons), strict=True)
    merged = [OrderedDict(item for part in step for item in part.items()) for step in steps]
    return Comparison(comparisons[0].backend, AccuracyResults([AccuracyResult({runners: merged})]))
