"""Where it first went wrong: the first value, in the order of the computation, that leaves its tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_trt.validate.compare import tokens_of_output
from deepseek_trt.validate.metrics import closeness
from deepseek_trt.validate.pair import Pair
from deepseek_trt.validate.probes import PLACES, Arrays


@dataclass(frozen=True)
class Fault:
    """`op` is what computed the value, `place` its probe name; `layer` is None before the first and after the last."""

    step: str
    graph: str
    layer: int | None
    place: str
    op: str
    row: int
    position: int
    max_relative: float
    tolerance: float


def first_fault(pair: Pair) -> Fault | None:
    """Search step by step, layer by layer, op by op; None where every value that was seen is within tolerance."""
    for index in range(len(pair.script.steps)):
        seen, expected = pair.probes.steps.get(index, {}), pair.reference_probes.steps.get(index, {})
        for name in _in_order(seen, pair.policy.layers):
            fault = _judge(pair, index, name, seen, expected)
            if fault is not None:
                return fault
        failed = [d for d in pair.differences if d.step == index and not d.passed]
        if failed:
            d = next((d for d in failed if d.output != "logits"), failed[0])
            return _fault(pair, index, d.output, d.row, d.position, d.closeness.max_relative, d.tolerance.relative)
    return None


def _in_order(seen: Arrays, layers: int) -> Iterator[str]:
    """Probe names as they are computed: a layer's input, then what it does."""
    places = ["hidden", *(place for place in PLACES if place != "hidden")]
    yield from (f"{p}.{layer}" for layer in range(layers + 1) for p in places if f"{p}.{layer}" in seen)


def _judge(pair: Pair, index: int, name: str, seen: Arrays, expected: Arrays) -> Fault | None:
    place, _, layer = name.rpartition(".")
    step = pair.script.steps[index]
    tokens = tokens_of_output(step, "tokens", len(seen[name]))
    if place == "router_ids":
        wrong = [f for f in pair.flips if (f.step, f.layer) == (index, int(layer)) and not f.near_tie]
        return _fault(pair, index, name, *tokens[wrong[0].token], wrong[0].margin, wrong[0].allowed) if wrong else None
    c, tolerance = closeness(seen[name], expected[name], pair.dtype), pair.policy(name).relative
    if c.max_relative <= tolerance:
        return None
    return _fault(pair, index, name, *tokens[c.worst[0]], c.max_relative, tolerance)


def _fault(pair: Pair, index: int, name: str, row: int, position: int, relative: float, tolerance: float) -> Fault:
    step, (place, _, layer) = pair.script.steps[index], name.rpartition(".")
    attention = "MlaPrefill" if step.graph == "prefill" else "MlaDecode"
    if name == "logits":
        number, op = None, "final norm or head"
    elif place == "hidden":  # what enters a layer was made by the one before
        number = int(layer) - 1 if int(layer) else None
        op = "MLP, shared experts or residual" if int(layer) else "embedding"
    else:
        op = {**PLACES, "attended": attention, "latents": f"{attention}, writing the cache"}[place]
        number = int(layer)
    return Fault(step.label, step.graph, number, name, op, row, position, relative, tolerance)
