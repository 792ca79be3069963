"""A graph pass: bfloat16 becomes float32, for runtimes that cannot compute in bfloat16.

Weights stay bfloat16 in their file and are cast when the graph is loaded; inputs and outputs become float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


class WidenBfloat16(ir.passes.InPlacePass):
    """Replaces bfloat16 by float32 throughout the main graph; says whether it modified anything."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = self._cast_initializers(model.graph)
        for node in model.graph:
            to = node.attributes.get("to")
            if node.op_type == "Cast" and to is not None and to.as_int() == _NARROW and not _casts_weight(node):
                node.attributes["to"] = ir.AttrInt64("to", int(_WIDE))
                modified = True
            modified |= _widen(node.outputs)
        modified |= _widen(model.graph.inputs)
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _cast_initializers(graph: ir.Graph) -> bool:
        first = next(iter(graph))
        narrow = [value for value in graph.initializers.values() if value.dtype == _NARROW]
        for value in narrow:
            cast = ir.node("Cast", [value], {"to": int(_WIDE)}, name=f"widen_{value.name}")
            cast.outputs[0].name = f"{value.name}.float32"
            cast.outputs[0].dtype, cast.outputs[0].shape = _WIDE, value.shape
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(first, cast)
        return bool(narrow)


def _casts_weight(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.is_initializer()


def _widen(values: Sequence[ir.Value]) -> bool:
    narrow = [value for value in values if value.dtype == _NARROW]
    for value in narrow:
        value.dtype = _WIDE
    return bool(narrow)
