"""A graph pass: the router, the experts and the shared experts of a layer become one MoeLayer, where they fit it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deepseek_trt.engines.plans.matching import made_by, only_user
from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.plugins.fused.moe_layer import MOE_LAYER

_NO_BIAS = "moe_layer.no_bias"  # what a router without one is given


class FuseMoeLayer(ir.passes.InPlacePass):
    """Puts a MoeLayer in the place of every router whose experts and shared experts take the same tokens.

    What does not match stays: no shared experts, another activation, biases in the shared experts, or a value between
    them that something else takes, too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        routers = [n for n in model.graph if n.domain == DOMAIN and n.op_type in ("MoeRouter", "MoeBiasedRouter")]
        found = [match for router in routers if (match := _match(router)) is not None]
        for match in found:
            _replace(model.graph, match)
        return ir.passes.PassResult(model, bool(found))


@dataclass(frozen=True)
class _Linear:
    """x W^T: its node, x and W."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value


@dataclass(frozen=True)
class _Match:
    """A layer of experts: the op's inputs from the graph, the nodes in its place, and the last of them."""

    router: ir.Node
    inputs: tuple[ir.Value, ...]
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]
    last: ir.Node


def _match(router: ir.Node) -> _Match | None:
    experts = only_user(router.outputs[0])
    logits = _linear(router.inputs[0])
    if experts is None or logits is None or experts is not only_user(router.outputs[1]):
        return None
    if experts.op_type != "MoeExperts" or experts.attributes.get_string("activation") != "silu":
        return None
    hidden, _, _, *stacks = experts.inputs
    last = only_user(experts.outputs[0])
    if last is None or last.op_type != "Add" or hidden is None or _before_cast(logits.x) is not hidden:
        return None
    shared = _shared(_other(last, experts.outputs[0]), hidden)
    if shared is None:
        return None
    nodes, weights = shared
    whole = (logits.node, router, experts, *nodes, last)
    if any(user not in whole for node in whole[:-1] for value in node.outputs for user, _ in value.uses()):
        return None
    router_weight = _before_cast(logits.weight)
    bias = router.inputs[1] if router.op_type == "MoeBiasedRouter" else None
    inputs = (hidden, router_weight, *(stack for stack in stacks if stack is not None), *weights)
    return _Match(router, inputs, bias, whole, last)


def _shared(
    output: ir.Value | None, hidden: ir.Value
) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ir.Value, ir.Value]] | None:
    """The nodes of down(silu(gate(hidden)) * up(hidden)) that give `output`, and the weights gate, up, down."""
    down = _linear(output)
    product = made_by(down.x, "Mul") if down else None
    if down is None or product is None:
        return None
    for first, second in (product.inputs, reversed(product.inputs)):
        activated, up = made_by(first, "Mul"), _linear(second)
        gate, nodes = _silu(activated) if activated else (None, ())
        if gate and up and gate.x is hidden and up.x is hidden:
            return (gate.node, up.node, *nodes, product, down.node), (gate.weight, up.weight, down.weight)
    return None


def _silu(product: ir.Node) -> tuple[_Linear | None, tuple[ir.Node, ...]]:
    """What x * sigmoid(x) is of, and the two nodes."""
    for first, second in (product.inputs, reversed(product.inputs)):
        sigmoid = made_by(second, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is first:
            return _linear(first), (sigmoid, product)
    return None, ()


def _linear(value: ir.Value | None) -> _Linear | None:
    """A product x W^T without a bias, as torch's linear layers are exported."""
    node = made_by(value, "Gemm")
    if node is None or any(extra is not None for extra in node.inputs[2:]):
        return None
    given = node.attributes
    plain = given.get_int("transB", 0) == 1 and given.get_int("transA", 0) == 0 and given.get_float("alpha", 1.0) == 1.0
    x, weight = node.inputs[:2]
    return _Linear(node, x, weight) if plain and x is not None and weight is not None else None


def _before_cast(value: ir.Value) -> ir.Value:
    """What `value` was before it became float32, in which the router works."""
    cast = made_by(value, "Cast")
    source = cast.inputs[0] if cast is not None else None
    return value if source is None else source


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    first, second = node.inputs
    return second if first is value else first


def _replace(graph: ir.Graph, match: _Match) -> None:
    hidden, router, *weights = match.inputs
    bias = match.bias if match.bias is not None else _no_bias(graph, router)
    names = {attribute.name for attribute in MOE_LAYER.attributes}
    attributes = [value for name, value in match.router.attributes.items() if name in names]
    biased = ir.AttrInt64("biased", int(match.bias is not None))
    name = MOE_LAYER.name + match.router.name[len(match.router.op_type) :] if match.router.name else MOE_LAYER.name
    layer = ir.Node(DOMAIN, MOE_LAYER.name, [hidden, router, bias, *weights], [*attributes, biased], name=name)
    old, new = match.last.outputs[0], layer.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.insert_before(match.last, layer)
    casts = [value.producer() for value in match.nodes[0].inputs if value is not None]
    graph.remove(match.nodes, safe=True)
    graph.remove([cast for cast in casts if cast is not None and _is_unused(cast)], safe=True)


def _is_unused(node: ir.Node) -> bool:
    return all(not value.uses() and not value.is_graph_output() for value in node.outputs)


def _no_bias(graph: ir.Graph, router: ir.Value) -> ir.Value:
    """Zeros, one a routed expert; models have one count of these in all layers."""
    if _NO_BIAS not in graph.initializers:
        assert router.shape is not None
        count = router.shape[0]
        assert isinstance(count, int)
        zeros = ir.tensor(np.zeros(count, dtype=np.float32), name=_NO_BIAS)
        value = ir.Value(name=_NO_BIAS, shape=ir.Shape([count]), type=ir.TensorType(zeros.dtype), const_value=zeros)
        graph.register_initializer(value)
    return graph.initializers[_NO_BIAS]
