"""AccuracyReport: what was compared, how well, and where it went wrong. docs/accuracy.md documents the JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_trt.export.config import ModelConfig
from deepseek_trt.validate.cases.cases import Script
from deepseek_trt.validate.cases.coverage import Coverage, coverage
from deepseek_trt.validate.findings.bisect import Fault, first_fault
from deepseek_trt.validate.findings.greedy import GreedyAgreement, greedy_agreement
from deepseek_trt.validate.findings.histogram import ErrorHistogram, error_histogram
from deepseek_trt.validate.findings.layers import (
    Drift,
    InnerValue,
    RouterAgreement,
    drift,
    inner_values,
    router_agreement,
)
from deepseek_trt.validate.findings.text_score import TextScore, text_score
from deepseek_trt.validate.findings.tokens import TokenAgreement, token_agreement
from deepseek_trt.validate.layerwise.parts import PartReport
from deepseek_trt.validate.numbers.compare import OutputDifference
from deepseek_trt.validate.numbers.routing import Flip
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.report.provenance import Provenance

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class WorstElement:
    """The element with the largest error: token `position` of batch row `row`; `index` is within that token."""

    step: str
    row: int
    position: int
    index: tuple[int, ...]
    value: float
    reference: float


@dataclass(frozen=True)
class OutputReport:
    """One output over all steps. Errors are relative to the largest |reference| of the output in its step."""

    output: str
    passed: bool
    steps: int
    max_relative: float
    mean_relative: float
    median_relative: float
    max_absolute: float
    median_ulps: float
    cosine: float
    nonfinite: int
    masks_differ: bool
    tolerance: float
    tolerance_reason: str
    worst: WorstElement


@dataclass(frozen=True)
class BackendReport:
    """One backend against the reference. `follows_routing` says whether the backend's router choices were seen.

    Where they were not, `set_aside` counts the lines (tokens) of each output that a near tie may explain.
    """

    backend: str
    computed_in: str
    note: str
    passed: bool
    unused_pages_were_nan: bool
    follows_routing: bool
    set_aside: dict[str, int]
    outputs: tuple[OutputReport, ...]
    tokens: TokenAgreement
    text: TextScore | None
    greedy: tuple[GreedyAgreement, ...]
    drift: tuple[Drift, ...]
    inner: tuple[InnerValue, ...]
    routers: tuple[RouterAgreement, ...]
    flips: tuple[Flip, ...]
    first_fault: Fault | None
    histogram: ErrorHistogram
    coverage: tuple[Coverage, ...]
    milliseconds: dict[str, tuple[float, ...]]
    reference_milliseconds: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class AccuracyReport:
    """The whole report; `parts` are those of a comparison layer by layer, and empty elsewhere."""

    passed: bool
    model: ModelConfig
    dtype: str
    changed_weights: tuple[str, ...]
    changed_files: tuple[str, ...]
    cases: dict[str, str]
    reference: str
    backends: tuple[BackendReport, ...]
    provenance: Provenance
    parts: tuple[PartReport, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; nan and the infinities as strings, as JSON has none."""
        plain: dict[str, Any] = plain_json(dataclasses.asdict(self))
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def backend_report(pair: Pair, floor: Pair | None) -> BackendReport:
    """What came out of one comparison; `floor` is torch in the candidate's dtype, where that was run."""
    text = text_score(pair, floor)
    return BackendReport(
        backend=pair.backend,
        computed_in=pair.dtype,
        note=pair.note,
        passed=pair.passed and (text is None or text.passed),
        unused_pages_were_nan=pair.poisoned,
        follows_routing=pair.sees_routing,
        set_aside=dict(pair.set_aside),
        outputs=output_reports(pair.differences),
        tokens=token_agreement(pair.script.steps, pair.results, pair.reference, pair.policy("logits").relative),
        text=text,
        greedy=greedy_agreement(pair),
        drift=drift(pair),
        inner=inner_values(pair),
        routers=router_agreement(pair),
        flips=pair.flips,
        first_fault=None if pair.passed else first_fault(pair),
        histogram=error_histogram(pair),
        coverage=coverage(pair.reference_probes, pair.config),
        milliseconds=milliseconds_by_graph(pair.script, [r.runtime for r in pair.results]),
        reference_milliseconds=milliseconds_by_graph(pair.script, [r.runtime for r in pair.reference]),
    )


def output_reports(differences: Sequence[OutputDifference]) -> tuple[OutputReport, ...]:
    """Each output over all steps."""
    by_name: dict[str, list[OutputDifference]] = {}
    for difference in differences:
        by_name.setdefault(difference.output, []).append(difference)
    return tuple(_output(name, found) for name, found in by_name.items())


def _output(name: str, found: list[OutputDifference]) -> OutputReport:
    worst = max(found, key=lambda d: d.closeness.max_relative)
    c = worst.closeness
    every = [d.closeness for d in found]
    return OutputReport(
        output=name,
        passed=all(d.passed for d in found),
        steps=len(found),
        max_relative=c.max_relative,
        mean_relative=float(np.mean([x.mean_relative for x in every])),
        median_relative=float(np.median([x.median_relative for x in every])),
        max_absolute=max(x.max_absolute for x in every),
        median_ulps=float(np.median([x.median_ulps for x in every])),
        cosine=min(x.cosine for x in every),
        nonfinite=sum(x.nonfinite for x in every),
        masks_differ=not all(x.same_masks for x in every),
        tolerance=worst.tolerance.relative,
        tolerance_reason=worst.tolerance.reason,
        worst=WorstElement(worst.label, worst.row, worst.position, c.worst[1:], c.worst_value, c.worst_reference),
    )


def milliseconds_by_graph(script: Script, seconds: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """Of each step, by graph."""
    times: dict[str, list[float]] = {}
    for step, took in zip(script.steps, seconds, strict=True):
        times.setdefault(step.graph, []).append(round(took * 1e3, 3))
    return {graph: tuple(values) for graph, values in times.items()}


def plain_json(value: Any) -> Any:
    """Lists and dicts with string keys; nan and the infinities as strings."""
    if isinstance(value, dict):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
