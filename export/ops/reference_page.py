"""docs/plugins.md, written from the OpSpecs: python -m deepseek_trt.export.ops.reference_page > docs/plugins.md"""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_trt.export.bundle.graph import DOMAIN
from deepseek_trt.export.ops import OPS
from deepseek_trt.export.ops.spec import OpSpec, TensorArg

_INTRODUCTION = f"""# The custom ops and their plugins

Written by `python -m deepseek_trt.export.ops.reference_page`. One contract an op serves torch
(`torch.ops.{DOMAIN}`), ONNX (domain `{DOMAIN}`, version 1, with a function body) and TensorRT (plugin of the same name,
version "1", namespace ""). `T` is the model's dtype: float32, float16 or bfloat16, one for all tensors of an op. Sizes:
B batch, S tokens per sequence, T tokens in all, H heads, N/R/V widths of a head's nope, rope and value parts,
L kv_lora_rank, D = L + R, E experts, K experts per token, I an expert's width, P pages in all, M pages per sequence.

A plugin library is made for one model and one dtype: the widths above are constants in its kernels, and a plugin
refuses tensors of other widths by name.
"""


def op_reference() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *("\n".join(_section(op)) for op in OPS)])


def _section(op: OpSpec) -> Iterator[str]:
    yield f"## {op.name}\n\n{op.doc}\n"
    for title, arguments in (("Input", op.inputs), ("Output", op.outputs)):
        yield f"| {title} | dtype | shape | |\n|---|---|---|---|"
        yield from (_row(a) for a in arguments)
        yield ""
    yield "| Attribute | type | |\n|---|---|---|"
    yield from (f"| `{a.name}` | {a.type} | {a.doc} |" for a in op.attributes)
    yield f"\nLimits: {op.limits}.\n"


def _row(argument: TensorArg) -> str:
    return f"| `{argument.name}` | {argument.dtype} | [{', '.join(argument.dims)}] | {argument.doc} |"


if __name__ == "__main__":
    print(op_reference(), end="")
