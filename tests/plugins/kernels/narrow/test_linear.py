"""LinearNarrow's kernels against float64, over every format: each code, each kind of edge, split sums."""

import pytest
import torch

from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.ops import narrow
from deepseek_trt.plugins.kernels import chips
from deepseek_trt.plugins.kernels.narrow import linear

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Codes are exact in every dtype and scales are applied in float32, so the output's rounding is all there is in 16 bits:
# half an ulp, uniformly spread at 0.29 of one. In float32 the sums of `columns` products round, about the square root
# of their count.
ULPS = {F32: 4.0, F16: 0.55, BF16: 0.55}
RMS_ULPS = {F32: 8.0, F16: 0.3, BF16: 0.3}

FORMATS = ["int8", "int4", "fp8"]
CASES = [  # dtype, tokens, rows, columns, tiles of
    (F32, 1, 40, 96, chips.INTERPRETER),
    (F32, 19, 200, 64, 86),
    (F16, 3, 130, 160, chips.INTERPRETER),
    (BF16, 1, 72, 544, 90),  # its sums are split
    (BF16, 70, 136, 96, 86),
    (BF16, 17, 129, 128, 90),
]
GROUPS = {"int8": 32, "int4": 32, "fp8": 128}


def weight_of(format, rows, columns, *stack):
    """Codes and scales of random numbers, each code among them where there is room."""
    generator = torch.Generator().manual_seed(rows + columns)
    if format == "fp8":
        codes = torch.randint(0, 256, (*stack, rows, columns), generator=generator, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x80  # no NaN; -0 in its place
        blocks = (*stack, -(-rows // 128), -(-columns // 128))
        return codes, torch.rand(blocks, generator=generator) / columns**0.5 / 100
    scales = (torch.randn(*stack, rows, columns // 32, generator=generator) / columns**0.5 / 50).half()
    if format == "int8":
        return torch.randint(-128, 128, (*stack, rows, columns), generator=generator, dtype=torch.int8), scales
    return torch.randint(0, 256, (*stack, rows, columns // 2), generator=generator, dtype=torch.uint8), scales * 16


def expected_products(x, codes, scales, format):
    """In float64, and with all terms positive."""
    numbers = narrow.widened(codes, scales, format, GROUPS[format]).double()
    return x.cpu().double() @ numbers.T, x.cpu().double().abs() @ numbers.abs().T


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "tokens", "rows", "columns", "sm"), CASES)
def test_multiplies(dtype, tokens, rows, columns, sm, format, device, use_tiles, assert_within, poison_new_memory):
    use_tiles(sm, linear)
    codes, scales = weight_of(format, rows, columns)
    torch.manual_seed(0)
    x = torch.randn(tokens, columns).to(dtype)
    output = linear.run(x.to(device), codes.to(device), scales.to(device), format, GROUPS[format])
    assert_within(output, *expected_products(x, codes, scales, format), ULPS[dtype], RMS_ULPS[dtype])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_exact(format, dtype, device):
    """Denormals and both zeros of E4M3 too: tokens that pick one column each give the numbers themselves."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    if format == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0
        scales = torch.ones(1, 1)
    else:
        codes = codes.view(torch.int8) if format == "int8" else codes.flatten().view(16, 16)
        scales = torch.ones(len(codes), 1).half()
    picked = linear.run(
        torch.eye(32, dtype=dtype, device=device), codes.to(device), scales.to(device), format, GROUPS[format]
    )
    assert torch.equal(picked.cpu().T.float(), narrow.widened(codes, scales, format, GROUPS[format]))


def test_blocks_of_e4m3_may_be_smaller_and_columns_any_number(device, assert_within):
    codes, scales = weight_of("fp8", 131, 137)
    x = torch.randn(5, 137)
    output = linear.run(x.to(device), codes.to(device), scales.to(device), "fp8", 128)
    assert_within(output, *expected_products(x, codes, scales, "fp8"), ULPS[F32], RMS_ULPS[F32])


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_read_or_written_beyond_the_tensors(format, device, memory_watch):
    codes, scales = weight_of(format, 70, 288)
    linear.run(torch.randn(3, 288, device=device), codes.to(device), scales.to(device), format, GROUPS[format])


@pytest.mark.parametrize("format", FORMATS)
def test_a_bad_token_spoils_itself_only(format, device):
    codes, scales = weight_of(format, 40, 64)
    x = torch.randn(6, 64)
    x[2, 5] = torch.nan
    output = linear.run(x.to(device), codes.to(device), scales.to(device), format, GROUPS[format])
    assert output.isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_a_token_has_the_same_bits_in_any_batch_of_a_bucket(device, use_tiles):
    use_tiles(86, linear)
    codes, scales = (t.to(device) for t in weight_of("int4", 72, 544))
    x = torch.randn(7, 544).to(BF16).to(device)
    together = linear.run(x, codes, scales, "int4", 32)
    assert torch.equal(linear.run(x[3:4], codes, scales, "int4", 32), together[3:4])


def test_no_tokens(device):
    codes, scales = (t.to(device) for t in weight_of("int8", 40, 64))
    assert linear.run(torch.randn(0, 64, device=device), codes, scales, "int8", 32).shape == (0, 40)


@pytest.mark.parametrize(("format", "group"), [("int3", 32), ("int8", 64), ("fp8", 32)])
def test_other_formats_are_refused(format, group, device):
    codes, scales = (t.to(device) for t in weight_of("int8", 40, 64))
    with pytest.raises(BackendError, match=f"not '{format}' in groups of {group}"):
        linear.run(torch.randn(1, 64, device=device), codes, scales, format, group)
