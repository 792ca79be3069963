"""Where it first went wrong: the first value, in the order of the computation, that leaves its tolerance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_trt.export.arrays import Arrays
from deepseek_trt.export.bundle.graph import LAST_HIDDEN
from deepseek_trt.validate.backends.probes import PLACES
from deepseek_trt.validate.numbers.metrics import closeness
from deepseek_trt.validate.pair import Pair


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


_OPS_OF_WEIGHTS = (
    (r"input_layernorm|self_attn\.q_", PLACES["query"]),
    (r"self_attn\.kv_", PLACES["latent"]),
    (r"self_attn\.w_", PLACES["attended"]),
    (r"self_attn\.o_", PLACES["after_attention"]),
    (r"post_attention_layernorm|mlp\.gate\.weight", PLACES["router_logits"]),
    (r"mlp\.gate\.", "MoeBiasedRouter"),
    (r"mlp\.experts\.", PLACES["experts"]),
    (r"", "MLP, shared experts or residual"),
)


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


def place_of_weight(name: str) -> tuple[int | None, str]:
    """The layer of a graph tensor, None before the first and after the last, and what is computed with it."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return None, "embedding" if "embed" in name else "final norm or head"
    return int(match[1]), next(op for pattern, op in _OPS_OF_WEIGHTS if re.search(pattern, match[2]))


def _in_order(seen: Arrays, layers: int) -> Iterator[str]:
    """Probe names as they are computed: a layer's input, then what it does."""
    places = ["hidden", *(place for place in PLACES if place != "hidden")]
    yield from (f"{p}.{layer}" for layer in range(layers + 1) for p in places if f"{p}.{layer}" in seen)


def _judge(pair: Pair, index: int, name: str, seen: Arrays, expected: Arrays) -> Fault | None:
    place, _, layer = name.rpartition(".")
    tokens = pair.script.steps[index].tokens
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
    if name in ("logits", LAST_HIDDEN):
        number, op = None, "final norm or head"
    elif place == "hidden":  # what enters a layer was made by the one before
        number = int(layer) - 1 if int(layer) else None
        op = "MLP, shared experts or residual" if int(layer) else "embedding"
    else:
        router = "MoeBiasedRouter" if pair.config.topk_method == "noaux_tc" else "MoeRouter"
        ops = {"attended": attention, "latents": f"{attention}, writing the cache"}
        op = {**PLACES, **ops, "router_ids": router, "router_weights": router}[place]
        number = int(layer)
    return Fault(step.label, step.graph, number, name, op, row, position, relative, tolerance)
