"""A graph pass: weights that TensorRT cannot take whole become several inputs, which plugins take in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from deepseek_trt.export.bundle.recipes import Part


class SplitWeights(ir.passes.InPlacePass):
    """Replaces graph inputs by their parts, by `parts` of each name, wherever a custom op takes them.

    The op's function body goes: it takes the tensor whole. `names` are the inputs' names afterwards.
    """

    def __init__(self, names: Sequence[str], parts: Mapping[str, Sequence[Part]]) -> None:
        super().__init__()
        self.names: list[str] = []
        self._given, self._parts = names, parts

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        whole = {value.name: value for value in graph.inputs}
        made: dict[str, list[ir.Value]] = {}
        for name in self._given:
            parts = self._parts[name]
            self.names += [part.name for part in parts]
            if len(parts) > 1:
                made[name] = [_input(part, whole[name]) for part in parts]
                at = graph.inputs.index(whole[name])
                graph.inputs[at : at + 1] = made[name]
        for node in list(graph):
            if any(value is not None and value.name in made for value in node.inputs):
                _take_parts(graph, node, made)
                model.functions.pop(node.op_identifier(), None)
        return ir.passes.PassResult(model, bool(made))


def _input(part: Part, whole: ir.Value) -> ir.Value:
    return ir.Value(name=part.name, shape=ir.Shape(part.shape), type=whole.type)


def _take_parts(graph: ir.Graph, node: ir.Node, made: Mapping[str, Sequence[ir.Value]]) -> None:
    """Put a node with more inputs in the place of one: an IR node's number of inputs is fixed."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        inputs += made.get(value.name or "", [value]) if value is not None else [None]
    wider = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        overload=node.overload,
        num_outputs=len(node.outputs),
        name=node.name,
    )
    for old, new in zip(node.outputs, wider.outputs, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.replace_all_uses_with(new)
    graph.insert_after(node, wider)
    graph.remove(node, safe=True)
