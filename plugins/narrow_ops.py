"""The ops over narrow weights and a narrow cache as TensorRT's plugins take them: one op a format, codes as bytes.

TensorRT gives plugins no unsigned bytes and, before SM 89, no fp8: the codes of every format are handed over as they
lie in memory, as int8. Attributes are those of the op, and must be the format's.
"""

from __future__ import annotations

import dataclasses

from deepseek_trt.export.bundle.narrow import FORMATS, Format
from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES
from deepseek_trt.export.ops import OPS
from deepseek_trt.export.ops.cache.codes import REST
from deepseek_trt.export.ops.cache.mla_decode_narrow import MLA_DECODE_NARROW
from deepseek_trt.export.ops.cache.mla_prefill_narrow import MLA_PREFILL_NARROW
from deepseek_trt.export.ops.linear_narrow import LINEAR_NARROW
from deepseek_trt.export.ops.moe_experts_narrow import MOE_EXPERTS_NARROW
from deepseek_trt.export.ops.spec import OpSpec, TensorArg
from deepseek_trt.plugins.fused import FUSED_OPS
from deepseek_trt.plugins.narrow_names import plugin_name


def _for_format(spec: OpSpec, kind: Format) -> OpSpec:
    inputs, outputs = (tuple(_typed(tensor, kind) for tensor in tensors) for tensors in (spec.inputs, spec.outputs))
    return dataclasses.replace(spec, name=plugin_name(spec.name, kind.name), inputs=inputs, outputs=outputs)


def _typed(tensor: TensorArg, kind: Format) -> TensorArg:
    """Codes and scales [.., rows, columns] in the format's dtypes and sizes; behind rope keys, scales are one size."""
    if tensor.dims[-1] == REST:
        return dataclasses.replace(tensor, dims=(*tensor.dims[:-1], "rest"))
    if tensor.dtype not in ("codes", "scales"):
        return tensor
    *stack, rows, columns = (dim.partition(" or ")[0].partition("/")[0] for dim in tensor.dims)
    if tensor.dtype == "codes":
        dims = (*stack, rows, _part(columns, kind.packed))
        return dataclasses.replace(tensor, dtype="int8", dims=dims)
    dims = (*stack, _part(rows, kind.rows), _part(columns, kind.group))
    return dataclasses.replace(tensor, dtype="float32" if kind.scale_dtype == "float32" else "float16", dims=dims)


def _part(dim: str, each: int) -> str:
    """How often `each` goes into a size, rounded up; of sizes that the graph chooses, a size of its own."""
    if each == 1:
        return dim
    return f"{dim}_by_{each}" if dim in ("in", "out") else f"{dim}/{each}"


_WEIGHTS, _CACHE = (LINEAR_NARROW, MOE_EXPERTS_NARROW), (MLA_PREFILL_NARROW, MLA_DECODE_NARROW)
_NARROW = (*_WEIGHTS, *_CACHE)
NARROW_PLUGINS = (
    *(_for_format(spec, kind) for spec in _WEIGHTS for kind in FORMATS.values()),
    *(_for_format(spec, FORMATS[format]) for spec in _CACHE for format in CACHE_DTYPES),
)

# All ops as plugins take them, and those that stand in engines only.
PLUGIN_OPS = (*(op for op in OPS if op not in _NARROW), *NARROW_PLUGINS, *FUSED_OPS)
