"""From the comparisons of all parts to one BackendReport: what is kept of each part once its arrays are gone."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from polygraphy.comparator import AccuracyResult, AccuracyResults

from deepseek_trt.validate.cases.cases import Script
from deepseek_trt.validate.cases.coverage import Coverage, coverage
from deepseek_trt.validate.findings.bisect import Fault, first_fault
from deepseek_trt.validate.findings.layers import Drift, RouterAgreement, drift, router_agreement
from deepseek_trt.validate.numbers.routing import Flip
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.report.report import (
    BackendReport,
    OutputReport,
    backend_report,
    milliseconds_by_graph,
    output_reports,
)


@dataclass(frozen=True)
class Finding:
    """One backend on one part. `whole` is the head's report, which alone knows of logits and tokens."""

    passed: bool
    accuracy: AccuracyResults
    outputs: tuple[OutputReport, ...]
    drift: tuple[Drift, ...]
    routers: tuple[RouterAgreement, ...]
    flips: tuple[Flip, ...]
    fault: Fault | None
    coverage: tuple[Coverage, ...]
    seconds: npt.NDArray[np.float64]  # [2, steps]: the backend's, the reference's
    whole: BackendReport | None


@dataclass(frozen=True)
class MergedComparison:
    """Polygraphy's verdicts on all parts of one backend."""

    backend: str
    accuracy: AccuracyResults


def finding(pair: Pair, is_head: bool) -> Finding:
    return Finding(
        passed=pair.passed,
        accuracy=pair.accuracy,
        outputs=output_reports(pair.differences),
        drift=drift(pair),
        routers=router_agreement(pair),
        flips=pair.flips,
        fault=None if pair.passed else first_fault(pair),
        coverage=coverage(pair.reference_probes, pair.config),
        seconds=np.array([[r.runtime for r in side] for side in (pair.results, pair.reference)]),
        whole=backend_report(pair, None) if is_head else None,
    )


def merge(findings: Sequence[Finding], script: Script) -> BackendReport:
    """The report of all parts, in their order; the last finding is the head's."""
    head = findings[-1].whole
    assert head is not None
    ours, theirs = np.sum([f.seconds for f in findings], axis=0).tolist()
    return dataclasses.replace(
        head,
        passed=all(f.passed for f in findings),
        follows_routing=True,
        text=None,  # the head alone says nothing of the whole model's loss
        outputs=tuple(x for f in findings for x in f.outputs),
        drift=tuple(x for f in findings for x in f.drift),
        routers=tuple(x for f in findings for x in f.routers),
        flips=tuple(x for f in findings for x in f.flips),
        first_fault=next((f.fault for f in findings if f.fault is not None), None),
        coverage=tuple(x for f in findings for x in f.coverage),
        milliseconds=milliseconds_by_graph(script, ours),
        reference_milliseconds=milliseconds_by_graph(script, theirs),
    )


def merge_accuracy(backend: str, findings: Sequence[Finding]) -> MergedComparison:
    """Each step's outputs of all parts side by side."""
    runners = next(iter(findings[0].accuracy[0]))
    steps = zip(*(f.accuracy[0][runners] for f in findings), strict=True)
    merged = [OrderedDict(item for part in step for item in part.items()) for step in steps]
    return MergedComparison(backend, AccuracyResults([AccuracyResult({runners: merged})]))
