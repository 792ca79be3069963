"""What the ops over a narrow cache share: a latent as codes and scales and back, in torch and in ONNX.

A group's scale is the largest |number| / 127 (int8) or 448 (fp8), computed in float32 and rounded to the model's dtype;
codes are number / scale in float32, rounded to the nearest, ties to even, by the scale as it is stored. A scale of 0
(zeros, or numbers too small for a scale in that dtype) has codes of 0. A group that holds NaN or an infinity has the
scale NaN, so that all of it reads as NaN. What is read is float32(code) * float32(scale), rounded to the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_trt.export.arrays import E4M3
from deepseek_trt.export.bundle.narrow_cache import TOPS
from deepseek_trt.export.ops import paging
from deepseek_trt.export.ops.spec import Attribute, TensorArg

ATTRIBUTES = (
    Attribute("format", "string", f"of the codes: {' or '.join(TOPS)} (docs/narrow.md)"),
    Attribute("group", "int", "numbers of a token's latent that share a scale"),
)
REST = "R+L/group"  # numbers of a token in the second pool
LIMITS = "groups are of 128 numbers, or there is one"
POOLS_IN = (
    TensorArg("past_latent", "codes", ("P", "page", "L"), "the pool of codes, int8; of fp8 the bits of float8 E4M3FN"),
    TensorArg("past_rope", "T", ("P", "page", REST), "the pool of rotated rope parts, then the latents' scales"),
)
POOLS_OUT = (
    TensorArg("present_latent", "codes", POOLS_IN[0].dims, "the pool with the new tokens; may be past_latent itself"),
    TensorArg("present_rope", "T", POOLS_IN[1].dims, "the pool with the new tokens; may be past_rope itself"),
)


def narrowed(latent: Tensor, rank: int, format: str, group: int) -> tuple[Tensor, Tensor]:
    """The rows of both pools for latents [.., D]: codes int8 [.., L], and rope part and scales [.., R + L/group]."""
    top = TOPS[format]
    numbers = latent[..., :rank].float().unflatten(-1, (-1, group))  # [.., L/group, group]
    strange = (numbers * 0).sum(-1)  # 0, or NaN where one is not finite
    scales = (numbers.abs().amax(-1) / top + strange).to(latent.dtype)
    steps = scales.float().unsqueeze(-1)
    ratios = (numbers / torch.where(steps == 0, 1.0, steps)).clamp(-top, top).flatten(-2)
    if format == "fp8":
        codes = ratios.to(torch.float8_e4m3fn).view(torch.int8)
    else:
        codes = ratios.nan_to_num(0.0).round().to(torch.int8)
    return codes, torch.cat([latent[..., rank:], scales], dim=-1)


def widened(codes: Tensor, rope: Tensor, format: str, group: int) -> Tensor:
    """The latents [.., D] that rows of both pools stand for, in the dtype of `rope`."""
    groups = codes.shape[-1] // group
    numbers = (codes.view(torch.float8_e4m3fn) if format == "fp8" else codes).float().unflatten(-1, (-1, group))
    scales = rope[..., rope.shape[-1] - groups :].float()
    latents = (numbers * scales.unsqueeze(-1)).flatten(-2).to(rope.dtype)
    return torch.cat([latents, rope[..., : rope.shape[-1] - groups]], dim=-1)


def write_and_read(
    latent: Tensor,
    past: tuple[Tensor, Tensor],
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    format: str,
    group: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All cached latents [B, T, D] of each row, the new ones as they were narrowed, and both pools with these."""
    rows = narrowed(latent, past[0].shape[-1], format, group)
    places = page_table, past_lengths, sequence_lengths
    codes, rope = (paging.write_latents(pool, new, *places) for pool, new in zip(past, rows, strict=True))
    lengths = past_lengths + sequence_lengths
    cached = (paging.read_latents(pool, page_table, lengths) for pool in (codes, rope))
    return widened(next(cached), next(cached), format, group), (codes, rope)


def write_body(format: str, group: int) -> str:
    """From both pasts, latent and the rest that WRITE_BODY takes to both presents; also code_dim."""
    top = TOPS[format]
    return f"""
    {paging.PLACES_BODY}
    to_the_end_of_row = Constant <value_ints = [2147483647]> ()
    by_group = Constant <value_ints = [0, 0, -1, {group}]> ()
    side_by_side = Constant <value_ints = [0, 0, -1]> ()
    zero_f = Constant <value_float = 0.0> ()
    one_f = Constant <value_float = 1.0> ()
    top_f = Constant <value_float = {top!r}> ()
    bottom_f = Constant <value_float = {-top!r}> ()
    code_dim = Shape <start = 2> (past_latent)
    new_c = Slice (latent, axis_0, code_dim, last_axis)
    new_rope = Slice (latent, code_dim, to_the_end_of_row, last_axis)
    new_f = Cast <to = 1> (new_c)
    new_groups = Reshape (new_f, by_group)
    new_sizes = Abs (new_groups)
    largest = ReduceMax <keepdims = 1> (new_sizes, last_axis)
    nothing = Mul (new_groups, zero_f)
    strange = ReduceSum <keepdims = 1> (nothing, last_axis)
    exact_steps = Div (largest, top_f)
    marked_steps = Add (exact_steps, strange)
    step_column = CastLike (marked_steps, latent)
    steps_f = Cast <to = 1> (step_column)
    no_step = Equal (steps_f, zero_f)
    divisors = Where (no_step, one_f, steps_f)
    ratios = Div (new_groups, divisors)
    ratios_within = Clip (ratios, bottom_f, top_f)
    {_FP8_CODES_BODY if format == "fp8" else "code_numbers = Round (ratios_within)"}
    codes_by_group = Cast <to = 3> (code_numbers)
    new_codes = Reshape (codes_by_group, side_by_side)
    new_scales = Squeeze (step_column, last_axis)
    new_rest = Concat <axis = -1> (new_rope, new_scales)
    present_latent = ScatterND (past_latent, slots, new_codes)
    present_rope = ScatterND (past_rope, slots, new_rest)
"""


def read_body(format: str, group: int) -> str:
    """As READ_BODY, from both presents and code_dim."""
    return f"""
    latent_dim = Shape <start = 2> (latent)
    keep_batch = Constant <value_ints = [0, -1]> ()
    code_pages = Gather <axis = 0> (present_latent, table)
    code_shape = Concat <axis = 0> (keep_batch, code_dim)
    code_rows = Reshape (code_pages, code_shape)
    rope_pages = Gather <axis = 0> (present_rope, table)
    rest_dim = Shape <start = 2> (past_rope)
    rest_shape = Concat <axis = 0> (keep_batch, rest_dim)
    rest_rows = Reshape (rope_pages, rest_shape)
    rope_dim = Sub (latent_dim, code_dim)
    rope_rows = Slice (rest_rows, axis_0, rope_dim, last_axis)
    scale_rows = Slice (rest_rows, rope_dim, to_the_end_of_row, last_axis)
    {_FP8_NUMBERS_BODY if format == "fp8" else "numbers = Cast <to = 1> (code_rows)"}
    numbers_by_group = Reshape (numbers, by_group)
    scales_f = Cast <to = 1> (scale_rows)
    scale_column = Unsqueeze (scales_f, last_axis)
    latents_by_group = Mul (numbers_by_group, scale_column)
    latents_f = Reshape (latents_by_group, side_by_side)
    latent_rows = CastLike (latents_f, latent)
    rows = Concat <axis = -1> (latent_rows, rope_rows)
    {paging.LIVE_BODY}
"""


# From ratios_within to code_numbers: the bits, as a number from -128 to 127, of what a cast to float8 rounds to. The
# exponent is found by comparison, as a logarithm is not exact: places says how many of 2^-5 .. 2^8 are not larger.
_POWERS = ", ".join(repr(2.0**e) for e in range(-5, 9))
_FP8_CODES_BODY = f"""
    as_fp8 = Cast <to = 17, saturate = 1> (ratios_within)
    rounded = Cast <to = 1> (as_fp8)
    sizes = Abs (rounded)
    powers = Constant <value_floats = [{_POWERS}]> ()
    steps_of_place = Constant <value_floats = [{", ".join(repr(2.0 ** (9 - e)) for e in range(15))}]> ()
    size_column = Unsqueeze (sizes, last_axis)
    reaches = GreaterOrEqual (size_column, powers)
    reached = Cast <to = 7> (reaches)
    places = ReduceSum <keepdims = 0> (reached, last_axis)
    per_step = Gather <axis = 0> (steps_of_place, places)
    mantissas = Mul (sizes, per_step)
    eight = Constant <value_float = 8.0> ()
    places_f = Cast <to = 1> (places)
    before = Mul (places_f, eight)
    magnitudes = Add (mantissas, before)
    half_of_codes = Constant <value_float = 128.0> ()
    negative_codes = Sub (magnitudes, half_of_codes)
    is_negative = Less (ratios_within, zero_f)
    code_numbers = Where (is_negative, negative_codes, magnitudes)
"""
# Of the codes -128 to 127, in this order.
_TABLE = ", ".join(repr(float(number)) for number in (*E4M3[128:], *E4M3[:128]))
_FP8_NUMBERS_BODY = f"""
    numbers_of_codes = Constant <value = float[256] {{{_TABLE}}}> ()
    first_code = Constant <value = int32 {{128}}> ()
    codes_signed = Cast <to = 6> (code_rows)
    code_places = Add (codes_signed, first_code)
    numbers = Gather <axis = 0> (numbers_of_codes, code_places)
"""
