"""ONNX functions: the body that each custom op has in a graph, for runtimes without a plugin."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.ops.spec import OPSET, OpSpec


def function_from_spec(spec: OpSpec, attributes: Mapping[str, Any], overload: str = "") -> ir.Function:
    """The op's body for these attribute values, declaring them so that a plugin sees them on the node.

    `overload` tells bodies apart where a graph has nodes of several.
    """
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{spec.name} <{', '.join(a.name for a in spec.attributes)}>"
        f" ({', '.join(i.name for i in spec.inputs)}) => ({', '.join(o.name for o in spec.outputs)})\n"
        f"{{{spec.body(attributes)}}}"
    )
    proto = onnx.parser.parse_function(text)
    proto.doc_string, proto.overload = spec.doc, overload
    return ir.serde.deserialize_function(proto)


def attach_functions(model: ir.Model, ops: tuple[OpSpec, ...]) -> dict[str, dict[str, Any]]:
    """Give each custom op in `model` its body and a name; returns the attribute values by op name.

    All nodes of one op share their attribute values: they are facts of the model, not of the layer.
    """
    used: dict[str, dict[str, Any]] = {}
    counts: collections.Counter[str] = collections.Counter()
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        node.name = f"{node.op_type}_{counts[node.op_type]}"  # TensorRT names the plugin's layer after it
        counts[node.op_type] += 1
        values = {name: attribute.value for name, attribute in node.attributes.items()}
        if used.setdefault(node.op_type, values) != values:
            raise AssertionError(f"{node.op_type}: nodes differ in attributes: {used[node.op_type]} and {values}")
    for spec in ops:
        if spec.name in used:
            function = function_from_spec(spec, used[spec.name])
            model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = 1
    return used
