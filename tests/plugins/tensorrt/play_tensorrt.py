"""Builds an engine of one op for each case on stdin, and prints as JSON what came of it.

Run as a program: a process has one plugin registry and one logger, and TensorRT may end it where a plugin misbehaves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from deepseek_trt.plugins.narrow_ops import PLUGIN_OPS
from deepseek_trt.plugins.tensorrt.loading import load_library
from deepseek_trt.plugins.tensorrt.op_tables import OpTable

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}
FREE = {"B": (1, 8), "S": (1, 64), "P": (2, 33), "M": (1, 4), "T": (1, 512)}  # smallest, largest
SPECS = {op.name: op for op in PLUGIN_OPS}


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the messages that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if int(severity) <= int(trt.ILogger.Severity.ERROR):
            self.errors.append(message)


def model_of(table: OpTable, attributes: dict[str, Any]) -> onnx.ModelProto:
    """One node of the op between the graph's inputs and outputs."""

    def value(tensor: Any) -> onnx.ValueInfoProto:
        dims = [table.size_of(d) if table.size_of(d) is not None else d for d in tensor.dims]
        return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[table.dtype_of(tensor)], dims)

    names = [[t.name for t in side] for side in (table.spec.inputs, table.spec.outputs)]
    node = helper.make_node(table.spec.name, *names, name="node", domain="deepseek_trt", **attributes)
    sides = [[value(t) for t in side] for side in (table.spec.inputs, table.spec.outputs)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("deepseek_trt", 1)]
    model = helper.make_model(helper.make_graph([node], "graph", *sides), opset_imports=opsets)
    model.ir_version = 10
    return model


def build(case: dict[str, Any], log: Log) -> dict[str, Any]:
    """Layers of the parsed network, and the plan's size, or None where one of the two failed."""
    table = OpTable(SPECS[case["op"]], case["dtype"], case["sizes"])
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse(model_of(table, case["attributes"]).SerializeToString()):
        return {"layers": None, "plan": None, "errors": log.errors[:]}
    plan = builder.build_serialized_network(network, config_of(builder, table))
    layers = [network.get_layer(i).type.name for i in range(network.num_layers)]
    return {"layers": layers, "plan": None if plan is None else plan.nbytes, "errors": log.errors[:]}


def config_of(builder: trt.Builder, table: OpTable) -> trt.IBuilderConfig:
    """For SM 86, with a profile over FREE and the cache updated in place."""
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for tensor in table.spec.inputs:
        sizes = [table.size_of(d) for d in tensor.dims]
        ends = [
            [FREE[d][end] if size is None else size for d, size in zip(tensor.dims, sizes, strict=True)]
            for end in (0, 1)
        ]
        profile.set_shape(tensor.name, ends[0], ends[1], ends[1])
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    return config


def main() -> None:
    """Cases from stdin to results on stdout."""
    log = Log()
    results = []
    for case in json.load(sys.stdin):
        manifest = load_library(Path(case["library"]), trt)
        results.append({**build(case, log), "library": manifest.sha256})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
