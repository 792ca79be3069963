"""Ops that stand in engines only: a build puts one in the place of several of the exported graph."""

from deepseek_trt.export.ops.spec import OpSpec
from deepseek_trt.plugins.fused.mla_query import MLA_QUERY
from deepseek_trt.plugins.fused.mla_value import MLA_VALUE
from deepseek_trt.plugins.fused.moe_layer import MOE_LAYER

FUSED_OPS: tuple[OpSpec, ...] = (MLA_QUERY, MLA_VALUE, MOE_LAYER)
