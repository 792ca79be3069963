"""The custom ops, one file each; OPS lists them all and `register` makes them known to torch."""

from deepseek_trt.export.ops.cache.mla_decode_narrow import MLA_DECODE_NARROW
from deepseek_trt.export.ops.cache.mla_prefill_narrow import MLA_PREFILL_NARROW
from deepseek_trt.export.ops.linear_narrow import LINEAR_NARROW
from deepseek_trt.export.ops.mla_decode import MLA_DECODE
from deepseek_trt.export.ops.mla_prefill import MLA_PREFILL
from deepseek_trt.export.ops.moe_biased_router import MOE_BIASED_ROUTER
from deepseek_trt.export.ops.moe_experts import MOE_EXPERTS
from deepseek_trt.export.ops.moe_experts_narrow import MOE_EXPERTS_NARROW
from deepseek_trt.export.ops.moe_router import MOE_ROUTER
from deepseek_trt.export.ops.spec import OpSpec

OPS: tuple[OpSpec, ...] = (
    MLA_PREFILL,
    MLA_DECODE,
    MOE_ROUTER,
    MOE_BIASED_ROUTER,
    MOE_EXPERTS,
    LINEAR_NARROW,
    MOE_EXPERTS_NARROW,
    MLA_PREFILL_NARROW,
    MLA_DECODE_NARROW,
)
