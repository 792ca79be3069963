"""Lay a candidate's outputs beside the reference's: verdicts for Polygraphy, and what a report says of each output."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from polygraphy.comparator import IterationResult, OutputCompareResult, SimpleThreshold

from deepseek_trt.export.arrays import Array
from deepseek_trt.validate.numbers.metrics import Closeness, closeness
from deepseek_trt.validate.numbers.tolerance import Policy, Tolerance
from deepseek_trt.validate.steps import Owners

Lines = Mapping[str, Owners]  # of each output's lines


@dataclass(frozen=True)
class OutputDifference:
    """One output of one step. `row` and `position` say whose token the worst element belongs to."""

    step: int
    label: str
    output: str
    closeness: Closeness
    tolerance: Tolerance
    row: int
    position: int

    @property
    def passed(self) -> bool:
        return self.closeness.max_relative <= self.tolerance.relative


@dataclass(frozen=True)
class ToleranceCompare:
    """Polygraphy's compare_func: each output's largest error, relative to its largest reference, with its tolerance.

    The results are Polygraphy's own, so that a saved file loads without this package.
    """

    policy: Policy

    def __call__(self, value: IterationResult, reference: IterationResult) -> OrderedDict[str, OutputCompareResult]:
        return OrderedDict(
            (name, self._one(judged_closeness(value[name], expected, self.policy.dtype), self.policy(name)))
            for name, expected in reference.items()
            if name in value
        )

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


def judged_closeness(value: Array, reference: Array, dtype: str) -> Closeness:
    """The closeness of an output: infinitely far where the reference is one number throughout, which proves nothing."""
    c = closeness(value, reference, dtype)
    return dataclasses.replace(c, max_absolute=math.inf, max_relative=math.inf) if c.is_constant else c


def differences_of_step(
    index: int, label: str, value: IterationResult, reference: IterationResult, lines: Lines, policy: Policy
) -> list[OutputDifference]:
    """Compare every output of the step that both have: a backend may be without latents."""
    found = []
    for name in (name for name in reference if name in value):
        c = judged_closeness(value[name], reference[name], policy.dtype)
        found.append(OutputDifference(index, label, name, c, policy(name), *lines[name][c.worst[0]]))
    return found
