"""MoeExperts' kernels against float64."""

import pytest
import torch

from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.kernels import chips, moe_experts

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Inner, each expert's output and the sum are rounded to the dtype once each: three halves of an ulp. In float32 the
# sums of `hidden` and of `inter` products round too, about the square root of their count.
ULPS = {F32: 4.0, F16: 1.5, BF16: 1.5}
RMS_ULPS = {F32: 8.0, F16: 0.6, BF16: 0.6}

CASES = [  # dtype, tokens, experts, top_k, hidden, inter, tiles of
    (F32, 1, 16, 4, 128, 64, chips.INTERPRETER),
    (F32, 21, 8, 3, 40, 24, chips.INTERPRETER),
    (F32, 20, 4, 2, 80, 72, 86),
    (F16, 30, 16, 4, 128, 64, chips.INTERPRETER),
    (F16, 12, 6, 2, 96, 144, 90),
    (BF16, 10, 64, 6, 128, 64, chips.INTERPRETER),
    (BF16, 40, 4, 2, 72, 100, 86),
    (BF16, 2, 160, 6, 32, 16, chips.INTERPRETER),
]


def make_operands(dtype, tokens, experts, top_k, hidden, inter, device):
    torch.manual_seed(0)
    operands = [
        torch.randn(tokens, hidden),
        torch.randn(experts, inter, hidden) / hidden**0.5,
        torch.randn(experts, inter, hidden) / hidden**0.5,
        torch.randn(experts, hidden, inter) / inter**0.5,
    ]
    x, gate, up, down = (operand.to(dtype).to(device) for operand in operands)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int().to(device)
    weights = torch.rand(tokens, top_k).to(device)
    return x, weights, ids, gate, up, down


def expected_sum(x, weights, ids, gate, up, down):
    """In float64, and with all terms of the last two sums positive."""
    x, weights, gate, up, down = (t.cpu().double() for t in (x, weights, gate, up, down))
    total, magnitude = torch.zeros_like(x), torch.zeros_like(x)
    for token, chosen in enumerate(ids.tolist()):
        for rank, expert in enumerate(chosen):
            inner = torch.nn.functional.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
            total[token] += weights[token, rank] * (down[expert] @ inner)
            magnitude[token] += weights[token, rank] * (down[expert].abs() @ inner.abs())
    return total, magnitude


@pytest.mark.parametrize(("dtype", "tokens", "experts", "top_k", "hidden", "inter", "sm"), CASES)
def test_sums_the_chosen_experts(dtype, tokens, experts, top_k, hidden, inter, sm, device, use_tiles, assert_within):
    use_tiles(sm, moe_experts)
    operands = make_operands(dtype, tokens, experts, top_k, hidden, inter, device)
    output = moe_experts.run(*operands, "silu")
    assert_within(output, *expected_sum(*operands), ULPS[dtype], RMS_ULPS[dtype])


def test_experts_nobody_chose_are_not_read(device, poison_new_memory, assert_within):
    x, weights, ids, gate, up, down = make_operands(F32, 7, 9, 2, 48, 32, device)
    ids = torch.tensor([[1, 5], [5, 1]] * 3 + [[5, 8]], dtype=torch.int32, device=device)
    for stack in (gate, up, down):
        for expert in set(range(9)) - {1, 5, 8}:
            stack[expert] = torch.nan
    output = moe_experts.run(x, weights, ids, gate, up, down, "silu")
    assert_within(output, *expected_sum(x, weights, ids, gate, up, down), ULPS[F32], RMS_ULPS[F32])


def test_a_bad_token_spoils_itself_only(device):
    x, *rest = make_operands(F32, 6, 4, 2, 32, 32, device)
    x[2, 5] = torch.nan
    output = moe_experts.run(x, *rest, "silu")
    assert output.isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_large_gates_stay_finite(device, assert_within):
    x, weights, ids, gate, up, down = make_operands(F32, 3, 4, 2, 32, 32, device)
    output = moe_experts.run(x, weights, ids, gate * 1000, up, down, "silu")
    expected = expected_sum(x, weights, ids, gate * 1000, up, down)
    assert_within(output, *expected, ULPS[F32], RMS_ULPS[F32])


def test_no_tokens(device):
    x, weights, ids, gate, up, down = make_operands(F32, 1, 4, 2, 32, 32, device)
    assert moe_experts.run(x[:0], weights[:0], ids[:0], gate, up, down, "silu").shape == (0, 32)


def test_other_activations_are_refused(device):
    operands = make_operands(F32, 1, 4, 2, 32, 32, device)
    with pytest.raises(BackendError, match="gelu"):
        moe_experts.run(*operands, "gelu")
