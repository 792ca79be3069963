"""A graph pass: bfloat16 becomes float32, for runtimes that cannot compute in bfloat16.

Weights stay bfloat16 in their file and are cast where they are used: whole, but for the embeddings, whose rows are cast
once they are looked up, and the experts, each of which is cast when a token chose it: most of the numbers are theirs.
Inputs and outputs become float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from deepseek_trt.export.bundle.graph import DOMAIN

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_EXPERTS = "MoeExperts"
_STACKS = ("gate_proj", "up_proj", "down_proj")  # its inputs that hold all experts


class WidenBfloat16(ir.passes.InPlacePass):
    """Replaces bfloat16 by float32 throughout the main graph; says whether it modified anything."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            to = node.attributes.get("to")
            if node.op_type == "Cast" and to is not None and to.as_int() == _NARROW and not _casts_weight(node):
                node.attributes["to"] = ir.AttrInt64("to", int(_WIDE))
                modified = True
            modified |= _widen(node.outputs)
        modified |= _widen(model.graph.inputs)
        for weight in [value for value in model.graph.initializers.values() if value.dtype == _NARROW]:
            _cast_weight(model.graph, weight)
            modified = True
        if modified:
            _cast_chosen_experts(model)
        return ir.passes.PassResult(model, modified)


def _cast_weight(graph: ir.Graph, weight: ir.Value) -> None:
    """Cast the weight before its users, and what is looked up in it after them; experts are cast in their function."""
    casts = 0
    for node, index in tuple(weight.uses()):
        if node.domain == DOMAIN and node.op_type == _EXPERTS:
            continue
        if node.op_type == "Gather" and index == 0:
            (rows,) = node.outputs
            users = tuple(rows.uses())
            rows.type = ir.TensorType(_NARROW)
            cast = _cast(rows, f"{weight.name}.rows")
            graph.insert_after(node, cast)
            for user, place in users:
                user.replace_input_with(place, cast.outputs[0])
        else:
            cast = _cast(weight, f"{weight.name}.float32" + (f".{casts}" if casts else ""))
            casts += 1
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(_WIDE)}, name=f"widen_{name}")
    node.outputs[0].name = name
    node.outputs[0].dtype, node.outputs[0].shape = _WIDE, value.shape
    return node


def _cast_chosen_experts(model: ir.Model) -> None:
    """In the body of MoeExperts, cast an expert's weights once they are picked out of all experts'."""
    for function in (f for f in model.functions.values() if (f.domain, f.name) == (DOMAIN, _EXPERTS)):
        for stack in (value for value in function.inputs if value.name in _STACKS):
            for node, _ in tuple(stack.uses()):
                (picked,) = node.outputs
                cast = _cast(picked, f"{picked.name}_float32")
                picked.replace_all_uses_with(cast.outputs[0])
                cast.replace_input_with(0, picked)
                assert node.graph is not None
                node.graph.insert_after(node, cast)


def _casts_weight(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.is_initializer()


def _widen(values: Sequence[ir.Value]) -> bool:
    narrow = [value for value in values if value.dtype == _NARROW]
    for value in narrow:
        value.type = ir.TensorType(_WIDE)  # a new one: clones of a model share the old
    return bool(narrow)
