"""Backends whose router choices cannot be seen: set aside what a near tie may explain, and judge the rest strictly.

A line of an output (one token's logits or latents) that leaves its tolerance is set aside when, in the reference, its
sequence met a near tie before: at that token or an earlier one, in an earlier layer. A fault moves most lines, a near
tie few: where more than MOST of an output's lines would be set aside, none is.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from polygraphy.comparator import IterationResult

from deepseek_trt.export.config import ModelConfig
from deepseek_trt.validate.compare import tokens_of_output
from deepseek_trt.validate.metrics import Array
from deepseek_trt.validate.pair import Pair

MOST = 0.5
Place = tuple[str, int]  # case and row: one sequence
Ties = dict[Place, list[tuple[int, int]]]  # (position, layer) of each near tie


def set_aside(pair: Pair, config: ModelConfig) -> Pair:
    """The pair with undecided lines judged as equal; unchanged where choices were seen, or where there is no router."""
    if pair.probes.steps or not any(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        return pair
    ties = near_ties(pair, config)
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


def near_ties(pair: Pair, config: ModelConfig) -> Ties:
    """Where rounding may have changed the reference's choice of experts."""
    found: Ties = defaultdict(list)
    for index, step in enumerate(pair.script.steps):
        for layer in range(config.num_hidden_layers):
            logits = pair.reference_probes.steps[index].get(f"router_logits.{layer}")
            if logits is None:
                continue
            close = closest_gap(logits, config) <= 2 * pair.policy(f"router_logits.{layer}").relative
            tokens = tokens_of_output(step, "tokens", len(logits))
            for line in close.nonzero()[0]:
                row, position = tokens[line]
                found[step.case, row].append((position, layer))
    return found


def closest_gap(logits: Array, config: ModelConfig) -> Array:
    """Of each token [T]: the gap between the last chosen and the first refused, expert or group, in router logits.

    Relative to the token's largest |logit|. A gap closes when both sides move by half of it.
    """
    scores = logits.astype(np.float64)
    gaps = [np.full(len(scores), np.inf)]
    if config.topk_method == "group_limited_greedy" and config.topk_group < config.n_group:
        grouped = scores.reshape(len(scores), config.n_group, -1)
        best = grouped.max(-1)
        ranked = -np.sort(-best, axis=-1)
        gaps.append(ranked[:, config.topk_group - 1] - ranked[:, config.topk_group])
        kept = best >= ranked[:, config.topk_group - 1, None]
        scores = np.where(kept[:, :, None], grouped, -np.inf).reshape(len(scores), -1)
    ranked = -np.sort(-scores, axis=-1)
    if config.num_experts_per_tok < scores.shape[1]:
        gaps.append(ranked[:, config.num_experts_per_tok - 1] - ranked[:, config.num_experts_per_tok])
    smallest: Array = np.min(gaps, axis=0) / np.abs(logits).max(-1)
    return smallest


def _undecided_lines(pair: Pair, index: int, ties: Ties) -> dict[str, Array]:
    """Of each output of the step: which lines are out of tolerance with a near tie in their past."""
    step, found = pair.script.steps[index], {}
    for name, value in pair.results[index].items():
        expected = pair.reference[index][name]
        limit = pair.policy(name).relative * np.abs(expected).max()
        out = ~(np.abs(value.astype(np.float64) - expected).max(-1) <= limit)
        depth = pair.policy.layers if name == "logits" else int(name.rpartition(".")[2])
        tokens = tokens_of_output(step, name, len(expected))
        past = [any(p <= at and layer < depth for p, layer in ties.get((step.case, row), [])) for row, at in tokens]
        found[name] = out & np.array(past)
    return found


def _judged(pair: Pair, index: int, undecided: dict[str, Array], kept: dict[str, int]) -> IterationResult:
    result = pair.results[index]
    outputs = {
        name: np.where(undecided[name][:, None], pair.reference[index][name], value) if name in kept else value
        for name, value in result.items()
    }
    return IterationResult(outputs=outputs, runtime=result.runtime, runner_name=result.runner_name)
