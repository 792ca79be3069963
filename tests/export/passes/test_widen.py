"""A graph of bfloat16 made one of float32."""

from __future__ import annotations

import onnx_ir as ir

from deepseek_trt.export.passes.widen import WidenBfloat16


def test_a_clone_that_is_widened_leaves_the_model_as_it_was() -> None:
    """An export keeps the graph in its own dtype beside the widened one, of the same trace."""
    stream = ir.Value(name="stream", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([2]))
    node = ir.node("Neg", [stream])
    node.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    graph = ir.Graph([stream], [node.outputs[0]], nodes=[node], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    clone = model.clone()
    assert WidenBfloat16()(clone).modified
    for of, dtype in ((clone, ir.DataType.FLOAT), (model, ir.DataType.BFLOAT16)):
        assert [value.dtype for value in (*of.graph.inputs, *of.graph.outputs)] == [dtype, dtype]
