"""What the ops over narrow weights share: codes and scales as float32 numbers, in torch and in ONNX."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_trt.export.bundle.narrow import FORMATS, GROUP
from deepseek_trt.export.ops.spec import Attribute, TensorArg

ATTRIBUTES = (
    Attribute("format", "string", f"of the codes: {' or '.join(FORMATS)} (docs/narrow.md)"),
    Attribute("group", "int", f"numbers of a row that share a scale: {GROUP}"),
)
LIMITS = "no plugin exists yet, TensorRT refuses bundles with narrow weights; the last dim is a multiple of the group"


def arguments(name: str, dims: tuple[str, ...], doc: str) -> tuple[TensorArg, TensorArg]:
    """Codes and scales of a weight of these dims."""
    *rows, columns = dims
    codes = TensorArg(name, "codes", (*rows, f"{columns} or {columns}/2"), f"{doc}: codes, int8 or two int4 in a uint8")
    return codes, TensorArg(f"{name}_scale", "float16", (*rows, f"{columns}/group"), f"{doc}: scales")


def widened(codes: Tensor, scale: Tensor, format: str, group: int) -> Tensor:
    """The numbers [.., N, K] in float32, each exact."""
    if FORMATS[format].packed > 1:
        halves = torch.stack([codes & 15, codes >> 4], dim=-1)  # [.., N, K/2, 2], the low half first
        codes = halves.flatten(-2).short() - FORMATS[format].bias
    grouped = codes.float().unflatten(-1, (-1, group))  # [.., N, K/group, group]
    return (grouped * scale.float()[..., None]).flatten(-2)


def constants(format: str, group: int) -> str:
    """The statements that `widen` relies on, once in a body."""
    text = f"""
    narrow_last = Constant <value_ints = [-1]> ()
    narrow_groups = Constant <value_ints = [0, -1, {group}]> ()
    narrow_rows = Constant <value_ints = [0, -1]> ()
    """
    if FORMATS[format].packed == 1:
        return text
    return f"""{text}
    narrow_low = Constant <value = uint8 {{15}}> ()
    narrow_half = Constant <value = uint8 {{4}}> ()
    narrow_bias = Constant <value_float = {float(FORMATS[format].bias)!r}> ()
    """


def widen(out: str, codes: str, scale: str, format: str) -> str:
    """Statements that make `out` [N, K] in float32 of the values `codes` and `scale`."""
    unpacked = f"{out}_codes = Cast <to = 1> ({codes})"
    if FORMATS[format].packed > 1:
        unpacked = f"""
        {out}_low = BitwiseAnd ({codes}, narrow_low)
        {out}_high = BitShift <direction = "RIGHT"> ({codes}, narrow_half)
        {out}_low_column = Unsqueeze ({out}_low, narrow_last)
        {out}_high_column = Unsqueeze ({out}_high, narrow_last)
        {out}_pairs = Concat <axis = -1> ({out}_low_column, {out}_high_column)
        {out}_biased = Cast <to = 1> ({out}_pairs)
        {out}_codes = Sub ({out}_biased, narrow_bias)
        """
    return f"""
        {unpacked}
        {out}_grouped = Reshape ({out}_codes, narrow_groups)
        {out}_scale_f = Cast <to = 1> ({scale})
        {out}_scale_column = Unsqueeze ({out}_scale_f, narrow_last)
        {out}_numbers = Mul ({out}_grouped, {out}_scale_column)
        {out} = Reshape ({out}_numbers, narrow_rows)
        """
