"""Nodes over codes and scales, of weights or of a cache, as TensorRT takes them: each under its format's name, codes as
bytes, and no bodies.

TensorRT's parser knows functions by their names alone, so that of several overloads one would serve all formats.
"""

from __future__ import annotations

import collections

import onnx

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.ops.cache.mla_decode_narrow import MLA_DECODE_NARROW
from deepseek_trt.export.ops.cache.mla_prefill_narrow import MLA_PREFILL_NARROW
from deepseek_trt.export.ops.linear_narrow import LINEAR_NARROW
from deepseek_trt.export.ops.moe_experts_narrow import MOE_EXPERTS_NARROW
from deepseek_trt.plugins.narrow_names import plugin_name

_CODES = {
    spec.name: [i for i, tensor in enumerate(spec.inputs) if tensor.dtype == "codes"]
    for spec in (LINEAR_NARROW, MOE_EXPERTS_NARROW, MLA_PREFILL_NARROW, MLA_DECODE_NARROW)
}


def with_narrow_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with such nodes; codes stay where they lie, in the file of the weights. Changes the model given."""
    graph = model.graph
    codes, counts = set(), collections.Counter[str]()
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in _CODES:
            codes |= {node.input[i] for i in _CODES[node.op_type]}
            format = next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "format").decode()
            node.op_type = plugin_name(node.op_type, format)
            node.name = f"{node.op_type}_{counts[node.op_type]}"
            node.overload = ""
            counts[node.op_type] += 1
    for tensor in graph.initializer:
        if tensor.name in codes:
            tensor.data_type = onnx.TensorProto.INT8
    for value in graph.value_info:
        if value.name in codes:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    kept = [f for f in model.functions if (f.domain, f.name) not in {(DOMAIN, name) for name in _CODES}]
    del model.functions[:]
    model.functions.extend(kept)
    return model
