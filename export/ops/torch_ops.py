"""The custom ops as torch sees them: importing this file registers each OpSpec under torch.ops.deepseek_trt."""

from __future__ import annotations

import torch
from torch._library.custom_ops import CustomOpDef

from deepseek_trt.export.ops import OPS
from deepseek_trt.export.ops.spec import OpSpec


def _register(spec: OpSpec) -> CustomOpDef:
    op = torch.library.custom_op(spec.qualified_name, spec.reference, mutates_args=())
    op.register_fake(spec.fake)
    return op


TORCH_OPS: dict[str, CustomOpDef] = {spec.name: _register(spec) for spec in OPS}

mla_prefill = TORCH_OPS["MlaPrefill"]
mla_decode = TORCH_OPS["MlaDecode"]
mla_prefill_narrow = TORCH_OPS["MlaPrefillNarrow"]
mla_decode_narrow = TORCH_OPS["MlaDecodeNarrow"]
moe_biased_router = TORCH_OPS["MoeBiasedRouter"]
moe_router = TORCH_OPS["MoeRouter"]
moe_experts = TORCH_OPS["MoeExperts"]
