"""Tolerances: how far an output may lie from the float32 reference, from how it is rounded on its way.

Errors are measured relative to the largest magnitude of the reference's output. A rounding in a dtype with unit
roundoff u moves a number by at most u times its size, and independent roundings add up like a random walk: R of them
give an error of about u * sqrt(R) times the number's size. A dot product of length n is summed in float32: n more
roundings of 2^-24. The largest of N errors lies as many standard deviations out as the largest of N outputs, so that
the ratio of the two, which is what is measured, does not depend on N.

Where the dtype's own torch run is at hand, its error is the measured rounding floor, and the tolerance is the smaller
of the derived one and FLOOR_FACTOR times that floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from deepseek_trt.export.dtypes import UNIT_ROUNDOFF

# What a layer rounds in its dtype on the way of one number. Attention: norm, q down, norm, q up, rope, W_UK, scores,
# softmax, attended, W_UV, output, residual; MLP: norm, gate, up, activation, product, down, shared sum, residual.
ROUNDINGS_PER_LAYER = 20
ROUNDINGS_OF_LOGITS = 2  # norm, head
ROUNDINGS_OF_JOIN = 3  # before the layer that drafts: the state, its norm (or the embedding's), the projection
# Of tokens that compiled operators take as 16-bit integers beside narrow weights: half a step of 1 / 32767 of the
# largest of 32. It is a share of the product as it is of the tokens: both are sums of independent terms.
TOKEN_ROUNDOFF = 2.0**-16
# Chance, and layers that enlarge a relative error (softmax, cancellation in residuals) beyond the random walk.
SAFETY = 2.0
# Same roundings in another order: errors of one distribution. Twice for chance, twice for four times as many roundings.
FLOOR_FACTOR = 4.0


@dataclass(frozen=True)
class Tolerance:
    """Largest |difference| allowed, relative to the largest |reference| of the output, and how it came about."""

    relative: float
    reason: str


def derive_tolerance(hidden_size: int, dtype: str, roundings: int, rounds_tokens: bool = False) -> Tolerance:
    """The tolerance after `roundings` roundings in `dtype`, each after a float32 dot product of length hidden_size.

    Where it `rounds_tokens`, each product takes them as 16-bit integers first.
    """
    u, u32, t = UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF["float32"], TOKEN_ROUNDOFF if rounds_tokens else 0.0
    walk = math.sqrt(roundings * (u**2 + t**2 + hidden_size * u32**2))
    tokens = " + 2^-32 of tokens in 16 bits" if rounds_tokens else ""
    reason = f"{dtype}: sqrt({roundings} roundings * (u^2{tokens} + {hidden_size} * 2^-48)), u = 2^{math.log2(u):.0f}"
    if dtype == "float32":
        walk *= math.sqrt(2.0)
        reason += ", * sqrt(2) as the reference rounds alike"
    return Tolerance(SAFETY * walk, f"{reason}, * {SAFETY:g} for safety")


def tighten(derived: Tolerance, floor: float | None) -> Tolerance:
    """The smaller of the derived tolerance and FLOOR_FACTOR times the measured rounding floor."""
    if not floor:
        return derived
    reason = f"{FLOOR_FACTOR:g} * the rounding floor {floor:.2e} (torch in this dtype against torch in float32)"
    if FLOOR_FACTOR * floor >= derived.relative:
        return Tolerance(derived.relative, f"{derived.reason}; {reason} would allow more")
    return Tolerance(FLOOR_FACTOR * floor, f"{reason}; derived limit {derived.relative:.2e}")


# Roundings since the layer's input, by probe or output; what is not here has gone through the last norm and the head.
_WITHIN_LAYER = {"hidden": 0, "query": 5, "latent": 4, "latents": 4, "attended": 9, "after_attention": 12}
_WITHIN_LAYER |= {"router_logits": 14, "router_weights": 15, "experts": 18}
DRAFT = "draft_"  # before the names of what the layer that drafts gives
_ALSO_CALLED = {"present": "latents", "hidden_states": "hidden"}  # as graphs of other bundles name them


def roundings_of(output: str, layers: int, is_local: bool = False) -> int:
    """Roundings on the way to an output or probe, "<place>.<layer>" or one that leaves the head.

    Those of the layer that drafts count from the states that it is given. Where it `is_local`, they count from the
    states that enter the layer or the head, which are rounded once.
    """
    joined = ROUNDINGS_OF_JOIN if output.startswith(DRAFT) else 0
    name, _, rest = output.removeprefix(DRAFT).partition(".")
    place, layer = _ALSO_CALLED.get(name, name), rest.partition(".")[0]
    if place not in _WITHIN_LAYER or (name == "hidden_states" and int(layer) == layers):  # the last one is normed
        return joined + ROUNDINGS_OF_LOGITS + (1 if is_local else layers * ROUNDINGS_PER_LAYER)
    before = int(layer)
    if is_local:
        before = min(before, 1) if place == "hidden" else 0  # hidden.N is what layer N - 1 made
    return joined + 1 + before * ROUNDINGS_PER_LAYER + _WITHIN_LAYER[place]


@dataclass(frozen=True)
class Policy:
    """Tolerances by output and probe name, for a model computed in `dtype`; floors are measured, where they are.

    Where it `is_local`, outputs are judged by the roundings of their own layer: each was fed the reference's states.
    """

    hidden_size: int
    layers: int
    dtype: str
    floors: Mapping[str, float] = field(default_factory=dict)
    is_local: bool = False
    rounds_tokens: bool = False

    def __call__(self, name: str) -> Tolerance:
        roundings = roundings_of(name, self.layers, self.is_local)
        derived = derive_tolerance(self.hidden_size, self.dtype, roundings, self.rounds_tokens)
        return tighten(derived, None if self.rounds_tokens else self.floors.get(name))
