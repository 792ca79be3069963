"""Backends whose router choices cannot be seen: set aside what a near tie may explain, and judge the rest strictly.

A line of an output (one token's logits or latents) that leaves its tolerance is set aside when, in the reference, its
sequence met a near tie before: at that token or an earlier one, in an earlier layer. A fault moves most lines, a near
tie few: where more than MOST of an output's lines would be set aside, none is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
from polygraphy.comparator import IterationResult

from deepseek_trt.export.arrays import Array
from deepseek_trt.validate.backends.probes import GAP
from deepseek_trt.validate.pair import Pair

MOST = 0.5
Place = tuple[str, int]  # case and row: one sequence
Ties = dict[Place, list[tuple[int, int]]]  # (position, layer) of each near tie


def set_aside(pair: Pair) -> Pair:
    """The pair with undecided lines judged as equal; unchanged where choices were seen, or where there is no router."""
    if pair.sees_routing:
        return pair
    ties = near_ties(pair)
    undecided = {index: _undecided_lines(pair, index, ties) for index in range(len(pair.results))}
    counts: dict[str, int] = defaultdict(int)
    totals: dict[str, int] = defaultdict(int)
    for index, by_output in undecided.items():
        for name, lines in by_output.items():
            counts[name] += int(lines.sum())
            totals[name] += len(pair.reference[index][name])
    kept = {name: n for name, n in counts.items() if 0 < n <= MOST * totals[name]}
    judged = [_judged(pair, index, by_output, kept) for index, by_output in undecided.items()]
    return dataclasses.replace(pair, judged=judged, set_aside=kept)


def near_ties(pair: Pair) -> Ties:
    """Where rounding may have changed the reference's choice of experts."""
    found: Ties = defaultdict(list)
    for index, step in enumerate(pair.script.steps):
        for layer in range(pair.policy.layers):
            gaps = pair.reference_probes.steps[index].get(f"{GAP}.{layer}")
            if gaps is None:
                continue
            close = gaps[:, 0] <= 2 * pair.policy(f"router_logits.{layer}").relative
            for line in close.nonzero()[0]:
                row, position = step.tokens[line]
                found[step.case, row].append((position, layer))
    return found


def _undecided_lines(pair: Pair, index: int, ties: Ties) -> dict[str, Array]:
    """Find which lines of each output of the step are out of tolerance with a near tie in their past."""
    step, found = pair.script.steps[index], {}
    for name, value in pair.results[index].items():
        expected = pair.reference[index][name]
        limit = pair.policy(name).relative * np.abs(expected).max()
        with np.errstate(invalid="ignore"):
            out = ~(np.abs(value.astype(np.float64) - expected).max(-1) <= limit)
        layer = name.rpartition(".")[2]
        depth = int(layer) if layer.isdecimal() else pair.policy.layers
        owners = pair.lines[index][name]
        first = itertools.repeat(0) if not pair.policy.is_local else (at for _, at in owners)  # a part has no past
        past = [
            any(since <= p <= at and layer < depth for p, layer in ties.get((step.case, row), []))
            for (row, at), since in zip(owners, first, strict=False)
        ]
        found[name] = out & np.array(past)
    return found


def _judged(pair: Pair, index: int, undecided: dict[str, Array], kept: dict[str, int]) -> IterationResult:
    result = pair.results[index]
    outputs = {
        name: np.where(undecided[name][:, None], pair.reference[index][name], value) if name in kept else value
        for name, value in result.items()
    }
    return IterationResult(outputs=outputs, runtime=result.runtime, runner_name=result.runner_name)
