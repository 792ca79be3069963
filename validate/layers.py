"""Layer by layer: how the error grows and how the routers agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_trt.validate.metrics import Array, closeness
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.probes import all_steps


@dataclass(frozen=True)
class Drift:
    """The residual stream as it enters layer `layer` (the last entry: as it leaves the last layer)."""

    layer: int
    max_relative: float
    mean_relative: float
    cosine: float
    tolerance: float


@dataclass(frozen=True)
class RouterAgreement:
    """One layer's router over all tokens. Flips are tokens with other experts; near ties are those rounding explains.

    `closest` is the smallest gap, over all tokens, between the last chosen and the best refused expert's probability in
    the reference: how near to a tie the inputs came.
    """

    layer: int
    tokens: int
    flips: int
    near_ties: int
    largest_margin: float
    closest: float


def drift(pair: Pair) -> tuple[Drift, ...]:
    """Empty where the candidate's inner values could not be seen."""
    found = []
    for layer in range(pair.policy.layers + 1):
        name = f"hidden.{layer}"
        ours, theirs = all_steps(pair.probes, name), all_steps(pair.reference_probes, name)
        if ours is not None and theirs is not None:
            c = closeness(ours, theirs, pair.dtype)
            tolerance = pair.policy(name).relative
            found.append(Drift(layer, c.max_relative, c.mean_relative, c.cosine, tolerance))
    return tuple(found)


def router_agreement(pair: Pair) -> tuple[RouterAgreement, ...]:
    found = []
    for layer in range(pair.policy.layers):
        logits = all_steps(pair.reference_probes, f"router_logits.{layer}")
        ids = all_steps(pair.reference_probes, f"router_ids.{layer}")
        if logits is None or ids is None or all_steps(pair.probes, f"router_ids.{layer}") is None:
            continue
        flips = [flip for flip in pair.flips if flip.layer == layer]
        ties = sum(flip.near_tie for flip in flips)
        largest = max((flip.margin for flip in flips), default=0.0)
        found.append(RouterAgreement(layer, len(logits), len(flips), ties, largest, _closest(logits, ids)))
    return tuple(found)


def _closest(logits: Array, ids: Array) -> float:
    """With limited routing an expert of a refused group may score higher than a chosen one: such gaps do not count."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    scores = shifted / shifted.sum(-1, keepdims=True)
    last = np.take_along_axis(scores, ids, -1).min(-1)
    np.put_along_axis(scores, ids, -1.0, -1)
    gaps = last[:, None] - scores
    return float(gaps[gaps >= 0].min(initial=1.0))
