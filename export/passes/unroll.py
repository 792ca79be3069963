"""Repeat traced layers: a graph traced with one layer of each kind becomes the graph of the whole model.

torch takes seconds to trace a layer, and the layers of one kind differ in their weights and page pools only. What is
copied is what torch traced, node by node; everything that depends on no layer (positions, cos, sin) stays single.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from deepseek_trt.export.passes.places import input_norm, normed_by

_LAYER = re.compile(r"(?:model\.layers|past_key_values|present)\.(\d+)\.")


@dataclass(frozen=True)
class _Segment:
    """The nodes of one traced layer, in order, between two values of the residual stream."""

    nodes: tuple[ir.Node, ...]
    entry: ir.Value
    exit: ir.Value
    presents: tuple[ir.Value, ...]  # the layer's cache with the new tokens; a graph without a cache has none
    own: dict[str, ir.Value]  # the layer's parameters and cache, by name


def unroll(model: ir.Model, kinds: Sequence[int]) -> None:
    """Change `model` so that its layer i is a copy of the traced layer kinds[i]."""
    graph = model.graph
    segments = [_segment(graph, layer) for layer in range(max(kinds) + 1)]
    for segment in segments:
        for name in segment.own:
            graph.initializers.pop(name, None)
    copies: list[ir.Node] = []
    pools: dict[str, ir.Value] = {}
    presents: list[ir.Value] = []
    stream = segments[0].entry
    for layer, kind in enumerate(kinds):
        segment = segments[kind]
        own = {value: _own_copy(value, kind, layer) for value in segment.own.values()}
        nodes, values = _copy(segment, {**own, segment.entry: stream}, layer)
        copies += nodes
        stream = values[segment.exit]
        for value in own.values():
            (pools if _is_past(value) else graph.initializers)[_name(value)] = value
        for present in segment.presents:
            presents.append(values[present])
            presents[-1].name = _of_layer(present, kind, layer)
    segments[-1].exit.replace_all_uses_with(stream)
    for past in filter(_is_past, graph.inputs):
        past.replace_all_uses_with(pools[_name(past)])
    graph.insert_before(segments[0].nodes[0], copies)
    graph.outputs[:] = [*(v for v in graph.outputs if not _name(v).startswith("present.")), *presents]
    graph.remove([node for segment in segments for node in segment.nodes], safe=True)
    graph.inputs[:] = [*(v for v in graph.inputs if not _is_past(v)), *pools.values()]
    graph.sort()


def _segment(graph: ir.Graph, layer: int) -> _Segment:
    at = f"model.layers.{layer}"
    own = {name: v for name, v in graph.initializers.items() if name.startswith(f"{at}.")}
    own.update({_name(v): v for v in graph.inputs if _name(v).startswith(f"past_key_values.{layer}.")})
    presents = tuple(v for v in graph.outputs if _name(v).startswith(f"present.{layer}."))
    entry = normed_by(own[input_norm(layer)])
    middle = normed_by(own[f"{at}.post_attention_layernorm.weight"])
    (last,) = (node for node in middle.consumers() if node.op_type == "Add")
    exit_ = last.outputs[0]
    after = _descendants(graph, [entry, *own.values()])
    before = _ancestors(graph, [exit_, *presents])
    return _Segment(tuple(n for n in graph if n in after and n in before), entry, exit_, presents, own)


def _descendants(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Node]:
    reached, nodes = set(values), set()
    for node in graph:
        if any(value in reached for value in node.inputs) and not _asks_cache_length(node):
            nodes.add(node)
            reached.update(node.outputs)
    return nodes


def _asks_cache_length(node: ir.Node) -> bool:
    """Whether the node depends on no layer, though it reads a layer's cache: all of them are of one length."""
    cache = node.inputs[0] if node.op_type == "Shape" else None
    return cache is not None and cache.is_graph_input() and _is_past(cache)


def _ancestors(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Node]:
    needed, nodes = set(values), set()
    for node in reversed(graph):
        if any(value in needed for value in node.outputs):
            nodes.add(node)
            needed.update(value for value in node.inputs if value is not None)
    return nodes


def _own_copy(value: ir.Value, kind: int, layer: int) -> ir.Value:
    """The parameter or cache of `layer` that stands where `value` stands in the traced layer `kind`."""
    name = _of_layer(value, kind, layer)
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)


def _of_layer(value: ir.Value, kind: int, layer: int) -> str:
    """The name of the traced layer `kind`'s value in `layer`."""
    assert _LAYER.match(_name(value)), value
    return _name(value).replace(f".{kind}.", f".{layer}.", 1)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _is_past(value: ir.Value) -> bool:
    return _name(value).startswith("past_key_values.")


def _copy(
    segment: _Segment, values: dict[ir.Value, ir.Value], layer: int
) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
    """The segment's nodes over `values` (old to new, what is not in it stays), and all values old to new."""
    nodes, values = [], dict(values)
    for node in segment.nodes:
        inputs = [None if v is None else values.get(v, v) for v in node.inputs]
        outputs = [ir.Value(name=f"layers.{layer}.{v.name}", shape=v.shape, type=v.type) for v in node.outputs]
        values.update(zip(node.outputs, outputs, strict=True))
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                outputs=outputs,
                version=node.version,
                name=f"layers.{layer}.{node.name}",
            )
        )
    return nodes, values
