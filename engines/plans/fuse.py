"""Fuse: nodes of a decode graph that one of the library's plugins computes together become one node."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deepseek_trt.engines.plans.fuse_mla import FuseMlaQuery, FuseMlaValue
from deepseek_trt.engines.plans.fuse_moe import FuseMoeLayer
from deepseek_trt.plugins.fused.mla_query import MLA_QUERY
from deepseek_trt.plugins.fused.mla_value import MLA_VALUE
from deepseek_trt.plugins.fused.moe_layer import MOE_LAYER


def fuse(graph: ir.Model, name: str, ops: Sequence[str]) -> bool:
    """Fuse what is to be fused in the graph `name`, with plugins for `ops`; whether anything was.

    Only decode's: a step of few tokens is bound by how many kernels it starts. With the tokens of a prefill TensorRT
    multiplies better.
    """
    passes = {MOE_LAYER.name: FuseMoeLayer(), MLA_QUERY.name: FuseMlaQuery(), MLA_VALUE.name: FuseMlaValue()}
    done = [step(graph).modified for op, step in passes.items() if name == "decode" and op in ops]
    if any(done):
        RemoveUnusedNodesPass()(graph)
    return any(done)
