"""Lay a candidate's outputs beside the reference's: verdicts for Polygraphy, and what a report says of each output."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from polygraphy.comparator import IterationResult, OutputCompareResult, SimpleThreshold

from deepseek_trt.validate.cases.cases import Step
from deepseek_trt.validate.numbers.metrics import Closeness, closeness
from deepseek_trt.validate.numbers.tolerance import Tolerance

Tolerances = Callable[[str], Tolerance]


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

    tolerance: Tolerances
    dtype: str

    def __call__(self, value: IterationResult, reference: IterationResult) -> OrderedDict[str, OutputCompareResult]:
        return OrderedDict(
            (name, self._one(closeness(value[name], expected, self.dtype), self.tolerance(name)))
            for name, expected in reference.items()
            if name in value
        )

    @staticmethod
    def _one(c: Closeness, tolerance: Tolerance) -> OutputCompareResult:
        scale = c.max_relative / c.max_absolute if c.same_masks and c.max_absolute else 0.0
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


def differences_of_step(
    index: int, step: Step, value: IterationResult, reference: IterationResult, tolerance: Tolerances, dtype: str
) -> list[OutputDifference]:
    """Every output of the step, compared."""
    found = []
    for name, expected in reference.items():
        if name not in value:  # a backend without latents
            continue
        c = closeness(value[name], expected, dtype)
        row, position = tokens_of_output(step, name, len(expected))[c.worst[0]]
        found.append(OutputDifference(index, step.label, name, c, tolerance(name), row, position))
    return found


def tokens_of_output(step: Step, output: str, length: int) -> list[tuple[int, int]]:
    """The (row, position in its sequence) that each line of an output belongs to."""
    if output.startswith("latents."):
        return [(row, t) for row, (_, total) in enumerate(step.cached()) for t in range(total)]
    ends = zip(step.past_lengths.tolist(), step.sequence_lengths.tolist(), strict=True)
    spans = [(row, past, new) for row, (past, new) in enumerate(ends) if new]
    if length == len(spans):
        return [(row, past + new - 1) for row, past, new in spans]
    return [(row, past + t) for row, past, new in spans for t in range(new)]
