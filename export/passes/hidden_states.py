"""A graph pass: every layer's input becomes an output, so that hidden states can be had of a graph without them."""

from __future__ import annotations

import onnx_ir as ir

from deepseek_trt.export.bundle.graph import GraphSpec, hidden_name
from deepseek_trt.export.passes.places import input_norm, normed_by

HIDDEN = "hidden_states."


class AddHiddenStates(ir.passes.InPlacePass):
    """Adds the outputs hidden_states.0 (embeddings), .i (of layer i - 1) and, the same as last_hidden_state, the last.

    They stand after the graph's first output, [B, S, hidden] in float32.
    """

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self._layers = sum(output.name.startswith(HIDDEN) for output in spec.outputs) - 1

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        last = graph.outputs[0]
        shape = ir.node("Shape", [last], name="hidden_states_shape")
        graph.append(shape)
        streams = [normed_by(graph.initializers[input_norm(index)]) for index in range(self._layers)]
        hidden = [self._output(graph, index, stream, shape.outputs[0]) for index, stream in enumerate(streams)]
        copy = ir.node("Identity", [last], name=hidden_name(self._layers))
        graph.append(copy)
        hidden.append(_named(copy.outputs[0], hidden_name(self._layers)))
        graph.outputs[:] = [last, *hidden, *graph.outputs[1:]]
        return ir.passes.PassResult(model, True)

    @staticmethod
    def _output(graph: ir.Graph, index: int, stream: ir.Value, shape: ir.Value) -> ir.Value:
        """The stream [T, hidden] as the output hidden_states.index."""
        name = hidden_name(index)
        cast = ir.node("Cast", [stream], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_float32")
        rows = ir.node("Reshape", [cast.outputs[0], shape], name=f"{name}_rows")
        graph.extend([cast, rows])
        return _named(rows.outputs[0], name)


def _named(value: ir.Value, name: str) -> ir.Value:
    value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    return value
