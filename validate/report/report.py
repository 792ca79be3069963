"""AccuracyReport: what was compared, how well, and where it went wrong. docs/accuracy.md documents the JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.comparator import AccuracyResults, IterationResult

from deepseek_trt.export.bundle.interface import Interface
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.json_text import json_text, plain_json
from deepseek_trt.validate.backends.published_weights import PublishedWeights
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
from deepseek_trt.validate.findings.narrowing import Narrowing
from deepseek_trt.validate.findings.text_score import TextScore, text_score
from deepseek_trt.validate.findings.tokens import TokenAgreement, token_agreement
from deepseek_trt.validate.independent.finding import Independent
from deepseek_trt.validate.numbers.compare import OutputDifference
from deepseek_trt.validate.numbers.metrics import Closeness
from deepseek_trt.validate.numbers.routing import Flip
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.report.digits import apart
from deepseek_trt.validate.report.integrity import Integrity, OddWeight
from deepseek_trt.validate.report.provenance import CheckpointFile, Provenance
from deepseek_trt.validate.steps import Script

SCHEMA_VERSION = 7


@dataclass(frozen=True)
class WorstElement:
    """The element with the largest error: token `position` of batch row `row`; `index` is within that token."""

    step: str
    row: int
    position: int
    index: tuple[int, ...]
    value: float
    reference: float

    @property
    def numbers(self) -> tuple[str, str]:
        """For people: value and reference, with digits enough to differ."""
        return apart(self.value, self.reference)


@dataclass(frozen=True)
class OutputReport:
    """One output over all steps. Errors are relative to the largest |reference| of the output in its step.

    `numbers` were compared in all; `reason` says why they prove nothing, else it is empty: then the error is infinite.
    """

    output: str
    passed: bool
    steps: int
    max_relative: float
    mean_relative: float
    median_relative: float
    max_absolute: float
    median_ulps: float
    cosine: float
    numbers: int
    nonfinite: int
    reference_nonfinite: int
    masks_differ: bool
    reason: str
    tolerance: float
    tolerance_reason: str
    worst: WorstElement

    @property
    def nearness(self) -> float:
        """The error as a part of its tolerance."""
        return self.max_relative / self.tolerance

    @property
    def error(self) -> str:
        """For people: the largest relative error, or why there is none."""
        return self.reason or f"{self.max_relative:.2e}"


@dataclass(frozen=True)
class BackendReport:
    """One backend against the reference, every output over all steps; what follows is empty where it was not seen.

    `tokens` and `histogram` are None where the outputs hold no predictions, `text` also without a text.
    `follows_routing` says whether the backend's router choices were seen. Where they were not, `set_aside` counts the
    lines (tokens) of each output that a near tie may explain. `fed_tokens` counts the real tokens of all steps.
    """

    backend: str
    computed_in: str
    note: str
    passed: bool
    unused_pages_were_nan: bool
    follows_routing: bool
    set_aside: dict[str, int]
    fed_tokens: int
    outputs: tuple[OutputReport, ...]
    tokens: TokenAgreement | None
    text: TextScore | None
    greedy: tuple[GreedyAgreement, ...]
    drift: tuple[Drift, ...]
    inner: tuple[InnerValue, ...]
    routers: tuple[RouterAgreement, ...]
    flips: tuple[Flip, ...]
    first_fault: Fault | None
    histogram: ErrorHistogram | None
    coverage: tuple[Coverage, ...]
    milliseconds: dict[str, tuple[float, ...]]
    reference_milliseconds: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class PartReport:
    """One part of a model that is compared layer by layer: what entered it, and each backend's verdict."""

    part: str
    inputs: str
    passed: dict[str, bool]


@dataclass(frozen=True)
class Margin:
    """The output that came nearest to its tolerance; `share` is its error as a part of it."""

    share: float
    backend: str
    output: str


@dataclass(frozen=True)
class Scope:
    """What the verdict covers. `not_compared` says what a bundle's user may run and no backend did, with the reason.

    `experts` were reached, of `experts_of` in all layers; None where they were not seen. `tokens` were fed, by backend.
    `checkpoint` is where the reference's weights come from, or came from at export.
    """

    layers: int
    layers_of: int
    not_compared: tuple[str, ...]
    experts: int | None
    experts_of: int
    tokens: dict[str, int]
    checkpoint: str
    checkpoint_files: tuple[CheckpointFile, ...]
    machine: str
    tool: str
    margin: Margin


@dataclass(frozen=True)
class Change:
    """One number that moved since an earlier report; `worse` makes it a regression."""

    backend: str
    what: str
    old: float
    new: float
    worse: bool


@dataclass(frozen=True)
class Moved:
    """What moved since the `earlier` report (its path); `unmatched` says what cannot be laid beside it."""

    earlier: str
    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.worse)


@dataclass(frozen=True)
class AccuracyReport:
    """The whole report. `interface` says what the graphs take and give; `parts` are of --layers, else empty.

    `odd_weights` hold NaN or infinities, or one number throughout. `narrowing` is what narrow weights cost, None where
    there are none or the whole ones are not at hand. `moved` is None without an earlier report. Neither what narrowing
    costs nor what got worse changes `passed`.
    """

    passed: bool
    scope: Scope
    independent: Independent
    interface: Interface
    model: ModelConfig
    dtype: str
    changed_weights: tuple[str, ...]
    changed_files: tuple[str, ...]
    odd_weights: tuple[OddWeight, ...]
    cases: dict[str, str]
    reference: str
    backends: tuple[BackendReport, ...]
    parts: tuple[PartReport, ...]
    provenance: Provenance
    moved: Moved | None = None
    narrowing: Narrowing | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def is_good(self) -> bool:
        """Passed, nothing got worse since an earlier report, and narrow weights cost no more than was allowed."""
        return self.passed and not (self.moved and self.moved.worse) and not self.costs_too_much

    @property
    def costs_too_much(self) -> tuple[str, ...]:
        """What narrow weights cost beyond what was allowed."""
        return self.narrowing.too_much if self.narrowing else ()

    @property
    def verdict(self) -> str:
        """One word, or what speaks against it though all lies within its tolerance."""
        if self.passed and self.costs_too_much:
            return f"Passed its tolerances, but narrow numbers cost MORE than allowed: {'; '.join(self.costs_too_much)}"
        if self.passed and not self.is_good:
            return "Passed its tolerances, but WORSE than the earlier report"
        return "Passed" if self.passed else "FAILED"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; nan and the infinities as strings, as JSON has none."""
        plain: dict[str, Any] = plain_json(dataclasses.asdict(self))
        return plain

    def to_json(self) -> str:
        return json_text(self.to_dict(), indent=1) + "\n"


@dataclass(frozen=True)
class Comparison:
    """Polygraphy's verdicts on one backend."""

    backend: str
    accuracy: AccuracyResults


@dataclass(frozen=True)
class Compared:
    """What comparing a bundle found, whatever it is for.

    `weights` are the reference's, None where it has the bundle's; `no_ort` says why the compiled operators could not be
    run where they should have been.
    """

    integrity: Integrity
    independent: Independent
    cases: dict[str, str]
    reference: str
    weights: PublishedWeights | None
    backends: tuple[BackendReport, ...]
    comparisons: tuple[Comparison, ...]
    parts: tuple[PartReport, ...] = ()
    narrowing: Narrowing | None = None
    no_ort: str = ""


def backend_report(pair: Pair, floor: Pair | None = None) -> BackendReport:
    """Report one comparison; `floor` is torch in the candidate's dtype, where that was run."""
    text = text_score(pair, floor)
    return BackendReport(
        backend=pair.backend,
        computed_in=pair.dtype,
        note=pair.note,
        passed=pair.passed and (text is None or text.passed),
        unused_pages_were_nan=pair.poisoned,
        follows_routing=pair.sees_routing,
        set_aside=dict(pair.set_aside),
        fed_tokens=sum(len(step.tokens) for step in pair.script.steps),
        outputs=_outputs(pair.differences),
        tokens=token_agreement(pair),
        text=text,
        greedy=greedy_agreement(pair),
        drift=drift(pair),
        inner=() if pair.policy.is_local else inner_values(pair),
        routers=router_agreement(pair),
        flips=pair.flips,
        first_fault=first_fault(pair) if pair.script.predicts and not pair.passed else None,
        histogram=error_histogram(pair),
        coverage=coverage(pair.reference_probes, pair.config),
        milliseconds=_by_graph(pair.script, pair.results),
        reference_milliseconds=_by_graph(pair.script, pair.reference),
    )


def _outputs(differences: Sequence[OutputDifference]) -> tuple[OutputReport, ...]:
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
        numbers=sum(x.size for x in every),
        nonfinite=sum(x.nonfinite for x in every),
        reference_nonfinite=sum(x.reference_nonfinite for x in every),
        masks_differ=not all(x.same_masks for x in every),
        reason=_reason(every) or worst.empty,
        tolerance=worst.tolerance.relative,
        tolerance_reason=worst.tolerance.reason,
        worst=WorstElement(worst.label, worst.row, worst.position, c.worst[1:], c.worst_value, c.worst_reference),
    )


def _reason(every: Sequence[Closeness]) -> str:
    ours, theirs, total = (sum(getattr(c, n) for c in every) for n in ("nonfinite", "reference_nonfinite", "size"))
    return f"not finite: {ours} of {total} numbers (reference: {theirs})" if ours or theirs else ""


def _by_graph(script: Script, results: Sequence[IterationResult]) -> dict[str, tuple[float, ...]]:
    """The milliseconds of each step, by graph."""
    times: dict[str, list[float]] = {}
    for step, result in zip(script.steps, results, strict=True):
        times.setdefault(step.graph, []).append(round(result.runtime * 1e3, 3))
    return {graph: tuple(values) for graph, values in times.items()}
