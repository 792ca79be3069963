"""What the ops over narrow weights share: codes and scales as float32 numbers, in torch and in ONNX."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_trt.export.arrays import E4M3
from deepseek_trt.export.bundle.narrow import BLOCK, FORMATS, GROUP
from deepseek_trt.export.ops.spec import Attribute, TensorArg

ATTRIBUTES = (
    Attribute("format", "string", f"of the codes: {' or '.join(FORMATS)} (docs/narrow.md)"),
    Attribute("group", "int", f"numbers of a row that share a scale: {GROUP}; of fp8 {BLOCK}, and as many rows"),
)
LIMITS = (
    "TensorRT has a plugin a format, named after it (LinearNarrowInt4), which takes the bytes of codes as int8; the "
    "last dim is a multiple of the group, but of fp8, whose last blocks may be smaller"
)


def arguments(name: str, dims: tuple[str, ...], doc: str) -> tuple[TensorArg, TensorArg]:
    """Codes and scales of a weight of these dims."""
    *rows, columns = dims
    said = f"{doc}: codes, int8, or two int4 or one fp8 in a uint8"
    codes = TensorArg(name, "codes", (*rows, f"{columns} or {columns}/2"), said)
    of_blocks = f"{doc}: scales; of fp8 float32 [.., {rows[-1]}/group, {columns}/group], rounded up"
    return codes, TensorArg(f"{name}_scale", "scales", (*rows, f"{columns}/group"), of_blocks)


def widened(codes: Tensor, scale: Tensor, format: str, group: int) -> Tensor:
    """The numbers [.., N, K] in float32: of whole numbers each is exact, of fp8 rounded."""
    if FORMATS[format].is_blocks:
        rows, columns = codes.shape[-2:]
        spread = scale.repeat_interleave(group, -2)[..., :rows, :].repeat_interleave(group, -1)[..., :columns]
        return codes.view(torch.float8_e4m3fn).float() * spread
    if FORMATS[format].packed > 1:
        halves = torch.stack([codes & 15, codes >> 4], dim=-1)  # [.., N, K/2, 2], the low half first
        codes = halves.flatten(-2).short() - FORMATS[format].bias
    grouped = codes.float().unflatten(-1, (-1, group))  # [.., N, K/group, group]
    return (grouped * scale.float()[..., None]).flatten(-2)


def constants(format: str, group: int) -> str:
    """The statements that `widen` relies on, once in a body."""
    if FORMATS[format].is_blocks:
        table = ", ".join(repr(float(number)) for number in E4M3)
        return f"""
    narrow_table = Constant <value = float[256] {{{table}}}> ()
    narrow_zero = Constant <value = int64 {{0}}> ()
    narrow_one = Constant <value = int64 {{1}}> ()
    narrow_block = Constant <value = int64 {{{group}}}> ()
    """
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
    if FORMATS[format].is_blocks:
        return f"""
        {out}_places = Cast <to = 6> ({codes})
        {out}_codes = Gather <axis = 0> (narrow_table, {out}_places)
        {_spread(f"{out}_of_rows", scale, codes, 0)}
        {_spread(f"{out}_steps", f"{out}_of_rows", codes, 1)}
        {out} = Mul ({out}_codes, {out}_steps)
        """
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


def _spread(out: str, scale: str, codes: str, axis: int) -> str:
    """Statements that repeat a block's scale for each of its rows (axis 0) or columns (1)."""
    return f"""
        {out}_dim = Shape <start = {axis}, end = {axis + 1}> ({codes})
        {out}_count = Squeeze ({out}_dim)
        {out}_each = Range (narrow_zero, {out}_count, narrow_one)
        {out}_blocks = Div ({out}_each, narrow_block)
        {out} = Gather <axis = {axis}> ({scale}, {out}_blocks)
        """
