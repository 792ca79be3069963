"""Lay a candidate's outputs beside the reference's: verdicts for Polygraphy, and what a report says of each output."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from polygraphy.comparator import IterationResult, OutputCompareResult, SimpleThreshold

from deepseek_trt.validate.numbers.metrics import Closeness, closeness
from deepseek_trt.validate.numbers.tolerance import Policy, Tolerance
from deepseek_trt.validate.steps import Owners

Lines = Mapping[str, Owners]  # of each output's lines


@dataclass(frozen=True)
class OutputDifference:
    """One output of one step. `row` and `position` say whose token the worst element belongs to.

    `empty` says why the output proves nothing, if so.
    """

    step: int
    label: str
    output: str
    closeness: Closeness
    tolerance: Tolerance
    row: int
    position: int
    empty: str

    @property
    def passed(self) -> bool:
        return self.closeness.max_relative <= self.tolerance.relative


@dataclass(frozen=True)
class ToleranceCompare:
    """Polygraphy's compare_func: each output's largest error, relative to its largest reference, with its tolerance.

    The results are Polygraphy's own, so that a saved file loads without this package.
    """

    policy: Policy
    empty: Mapping[str, str] = field(default_factory=dict)  # outputs that prove nothing, with the reason

    def __call__(self, value: IterationResult, reference: IterationResult) -> OrderedDict[str, OutputCompareResult]:
        return OrderedDict(
            (name, self._one(self._judge(name, closeness(value[name], expected, self.policy.dtype)), self.policy(name)))
            for name, expected in reference.items()
            if name in value
        )

    def _judge(self, name: str, c: Closeness) -> Closeness:
        return infinitely_far(c) if name in self.empty else c

    @staticmethod
    def _one(c: Closeness, tolerance: Tolerance) -> OutputCompareResult:
        scale = c.max_relative / c.max_absolute if math.isfinite(c.max_absolute) and c.max_absolute else 0.0
        absolute = [c.max_absolute] + [x / scale if scale else 0.0 for x in (c.mean_relative, c.median_relative)]
        return OutputCompareResult(
            max_absdiff=absolute[0],
            max_reldiff=c.max_relative,
            mean_absdiff=absolute[1],
            mean_reldiff=c.mean_relative,
            median_absdiff=absolute[2],
            median_reldiff=c.median_relative,
            quantile_absdiff=None,
            quantile_reldiff=None,
            thresholds=SimpleThreshold(check_error_stat="max", atol=0.0, rtol=tolerance.relative),
        )


def infinitely_far(c: Closeness) -> Closeness:
    """What is judged of an output that proves nothing, however close it is."""
    return dataclasses.replace(c, max_absolute=math.inf, max_relative=math.inf)


def differences_of_step(
    index: int,
    label: str,
    value: IterationResult,
    reference: IterationResult,
    lines: Lines,
    policy: Policy,
    empty: Mapping[str, str],
) -> list[OutputDifference]:
    """Compare every output of the step that both have: a backend may be without latents. `empty` ones prove nothing."""
    found = []
    for name in (name for name in reference if name in value):
        c, why = closeness(value[name], reference[name], policy.dtype), empty.get(name, "")
        owner = lines[name][c.worst[0]]
        found.append(OutputDifference(index, label, name, infinitely_far(c) if why else c, policy(name), *owner, why))
    return found
