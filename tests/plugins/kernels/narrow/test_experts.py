"""MoeExpertsNarrow's kernels against float64, over every format."""

import pytest
import torch

from deepseek_trt.export.errors import BackendError
from deepseek_trt.export.ops import narrow
from deepseek_trt.plugins.kernels import chips
from deepseek_trt.plugins.kernels.narrow import experts as narrow_experts

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# As of whole weights: inner, each expert's output and the sum are rounded to the dtype once each, and codes and scales
# are exact. In float32 the sums round, about the square root of their count.
ULPS = {F32: 4.0, F16: 1.5, BF16: 1.5}
RMS_ULPS = {F32: 8.0, F16: 0.6, BF16: 0.6}
GROUPS = {"int8": 32, "int4": 32, "fp8": 128}

CASES = [  # format, dtype, tokens, experts, top_k, hidden, inter, tiles of
    ("int8", F32, 5, 8, 3, 96, 64, chips.INTERPRETER),
    ("int8", BF16, 40, 4, 2, 64, 160, 86),
    ("int4", F32, 12, 4, 2, 64, 96, 86),
    ("int4", F16, 9, 16, 4, 128, 64, chips.INTERPRETER),
    ("int4", BF16, 2, 16, 6, 64, 32, 90),
    ("fp8", F32, 5, 6, 2, 130, 140, chips.INTERPRETER),
    ("fp8", BF16, 30, 4, 3, 136, 72, 90),
]


def make_operands(format, dtype, tokens, experts, top_k, hidden, inter):
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(1)

    def stack(rows, columns):
        if format == "fp8":
            codes = torch.randint(0, 256, (experts, rows, columns), generator=made, dtype=torch.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0x80
            blocks = (experts, -(-rows // 128), -(-columns // 128))
            return codes, torch.rand(blocks, generator=made) / columns**0.5 / 100
        scales = torch.randn(experts, rows, columns // 32, generator=made) / columns**0.5
        if format == "int8":
            codes = torch.randint(-128, 128, (experts, rows, columns), generator=made, dtype=torch.int8)
            return codes, (scales / 64).half()
        codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=made, dtype=torch.uint8)
        return codes, (scales / 4).half()

    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    return x, weights, ids, *stack(inter, hidden), *stack(inter, hidden), *stack(hidden, inter)


def expected_sum(format, x, weights, ids, *stacks):
    """In float64, and with all terms of the last two sums positive."""
    pairs = zip(stacks[::2], stacks[1::2], strict=True)
    gate, up, down = (narrow.widened(codes, scales, format, GROUPS[format]).double() for codes, scales in pairs)
    x, weights = x.double(), weights.double()
    total, magnitude = torch.zeros_like(x), torch.zeros_like(x)
    for token, chosen in enumerate(ids.tolist()):
        for rank, expert in enumerate(chosen):
            inner = torch.nn.functional.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
            total[token] += weights[token, rank] * (down[expert] @ inner)
            magnitude[token] += weights[token, rank] * (down[expert].abs() @ inner.abs())
    return total, magnitude


@pytest.mark.parametrize(("format", "dtype", "tokens", "experts", "top_k", "hidden", "inter", "sm"), CASES)
def test_sums_the_chosen_experts(
    format, dtype, tokens, experts, top_k, hidden, inter, sm, device, use_tiles, assert_within, poison_new_memory
):
    use_tiles(sm, narrow_experts)
    operands = make_operands(format, dtype, tokens, experts, top_k, hidden, inter)
    output = narrow_experts.run(*(o.to(device) for o in operands), "silu", format, GROUPS[format])
    assert_within(output, *expected_sum(format, *operands), ULPS[dtype], RMS_ULPS[dtype])


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_nothing_is_read_or_written_beyond_the_tensors(format, device, memory_watch):
    operands = make_operands(format, F32, 3, 4, 2, 96, 64)
    narrow_experts.run(*(o.to(device) for o in operands), "silu", format, GROUPS[format])


def test_experts_nobody_chose_are_not_read(device, assert_within):
    operands = list(make_operands("fp8", F32, 6, 9, 2, 48, 32))
    operands[2] = torch.tensor([[1, 5], [5, 1]] * 3, dtype=torch.int32)
    for scales in operands[4::2]:
        scales[[0, 2, 3, 4, 6, 7, 8]] = torch.nan
    output = narrow_experts.run(*(o.to(device) for o in operands), "silu", "fp8", 128)
    assert_within(output, *expected_sum("fp8", *operands), ULPS[F32], RMS_ULPS[F32])


def test_no_tokens(device):
    x, weights, ids, *stacks = (o.to(device) for o in make_operands("int8", F32, 1, 4, 2, 32, 32))
    assert narrow_experts.run(x[:0], weights[:0], ids[:0], *stacks, "silu", "int8", 32).shape == (0, 32)


def test_other_activations_are_refused(device):
    operands = make_operands("int8", F32, 1, 4, 2, 32, 32)
    with pytest.raises(BackendError, match="gelu"):
        narrow_experts.run(*(o.to(device) for o in operands), "gelu", "int8", 32)
