"""Layer by layer: how the error grows and how the routers agree."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.validate.backends.probes import GAP, PLACES, all_steps
from deepseek_trt.validate.numbers.metrics import closeness
from deepseek_trt.validate.pair import Pair, largest_errors


@dataclass(frozen=True)
class Drift:
    """The residual stream as it enters layer `layer` (the last entry: as it leaves the last layer).

    `growth` is its mean error over that of the entry before: what the layer before made of it; None where that was 0.
    """

    layer: int
    max_relative: float
    mean_relative: float
    cosine: float
    growth: float | None
    tolerance: float


@dataclass(frozen=True)
class InnerValue:
    """The largest error of one place in one layer, over all steps, and its tolerance; probes.PLACES says what it is."""

    place: str
    layer: int
    max_relative: float
    tolerance: float


@dataclass(frozen=True)
class RouterAgreement:
    """One layer's router over all tokens. Flips are tokens with other experts; near ties are those rounding explains.

    `closest` is the smallest gap, over all tokens, between the last chosen and the first refused in the reference, in
    router logits relative to the token's largest: how near to a tie the inputs came.
    """

    layer: int
    tokens: int
    flips: int
    near_ties: int
    largest_margin: float
    closest: float


def drift(pair: Pair) -> tuple[Drift, ...]:
    """Empty where the candidate's inner values could not be seen."""
    found: list[Drift] = []
    for layer in range(pair.policy.layers + 1):
        name = f"hidden.{layer}"
        ours, theirs = all_steps(pair.probes, name), all_steps(pair.reference_probes, name)
        if ours is not None and theirs is not None:
            c = closeness(ours, theirs, pair.dtype)
            before = found[-1].mean_relative if found else 0.0
            growth = c.mean_relative / before if before else None
            tolerance = pair.policy(name).relative
            found.append(Drift(layer, c.max_relative, c.mean_relative, c.cosine, growth, tolerance))
    return tuple(found)


def inner_values(pair: Pair) -> tuple[InnerValue, ...]:
    """List every place that was watched, in the order of the computation; router choices are listed as flips."""
    errors = largest_errors(pair, len(pair.script.steps))
    places = [place for place in PLACES if place != "router_ids"]
    names = [(place, layer) for layer in range(pair.policy.layers + 1) for place in places]
    return tuple(
        InnerValue(place, layer, errors[f"{place}.{layer}"], pair.policy(f"{place}.{layer}").relative)
        for place, layer in names
        if f"{place}.{layer}" in errors
    )


def router_agreement(pair: Pair) -> tuple[RouterAgreement, ...]:
    found = []
    for layer in range(pair.policy.layers):
        gaps = all_steps(pair.reference_probes, f"{GAP}.{layer}")
        if gaps is None or all_steps(pair.probes, f"router_ids.{layer}") is None:
            continue
        flips = [flip for flip in pair.flips if flip.layer == layer]
        ties = sum(flip.near_tie for flip in flips)
        largest = max((flip.margin for flip in flips), default=0.0)
        found.append(RouterAgreement(layer, len(gaps), len(flips), ties, largest, float(gaps.min())))
    return tuple(found)
