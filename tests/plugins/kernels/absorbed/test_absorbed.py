"""MlaQuery's and MlaValue's kernels against float64, and their references against the model's attention."""

import pytest
import torch

from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.model import Attention
from deepseek_trt.plugins.fused.mla_query import mla_query
from deepseek_trt.plugins.fused.mla_value import mla_value
from deepseek_trt.plugins.kernels import chips
from deepseek_trt.plugins.kernels.absorbed import query, value

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-6

# Each number is rounded to the dtype once. In float32 the sums round too: of up to 128 products, or squares.
ULPS = {F32: 6.0, F16: 0.75, BF16: 0.75}
RMS_ULPS = {F32: 3.0, F16: 0.35, BF16: 0.35}

CASES = [  # dtype, batch, tokens a row, heads, rank, rope, nope, value, tiles of
    (F32, 1, 1, 3, 40, 8, 24, 20, chips.INTERPRETER),
    (F32, 3, 8, 2, 64, 16, 32, 32, chips.INTERPRETER),
    (F32, 2, 9, 4, 128, 12, 16, 48, 86),
    (F16, 5, 1, 4, 64, 16, 32, 32, chips.INTERPRETER),
    (BF16, 1, 1, 2, 512, 64, 128, 128, 90),
    (BF16, 40, 2, 2, 72, 16, 40, 24, chips.INTERPRETER),  # more tokens than the first bucket
    (BF16, 17, 1, 2, 64, 16, 32, 32, 86),
]
PARAMETERS = ("dtype", "batch", "seq", "heads", "rank", "rope", "nope", "width", "sm")


def query_operands(dtype, batch, seq, heads, rank, rope, nope, device):
    torch.manual_seed(0)
    tokens, angles = batch * seq, torch.rand(batch, seq, rope // 2) * 6
    q, kv = torch.randn(tokens, heads * (nope + rope)), torch.randn(tokens, rank + rope)
    norm, w_uk = torch.rand(rank) + 0.5, torch.randn(heads, nope, rank) / nope**0.5
    q, kv, norm, w_uk = (t.to(dtype).to(device) for t in (q, kv, norm, w_uk))
    return q, kv, angles.cos().to(device), angles.sin().to(device), norm, w_uk


def rotated(x, cos, sin):
    """Adjacent pairs of x [..., R] turned; and the terms of each sum, all positive."""
    first, second = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return turned, torch.stack([(first * cos).abs() + (second * sin).abs()] * 2, -1).flatten(-2) + turned.abs()


def expected_query(q, kv, cos, sin, norm, w_uk):
    """In float64: (query, its magnitude), (latent, its magnitude)."""
    q, kv, cos, sin, norm, w_uk = (t.cpu().double() for t in (q, kv, cos, sin, norm, w_uk))
    heads, nope, rank = w_uk.shape
    q = q.unflatten(1, (heads, -1)).unflatten(0, cos.shape[:2])
    kv = kv.unflatten(0, cos.shape[:2])
    absorbed = torch.einsum("bshn,hnl->bshl", q[..., :nope], w_uk)
    size = torch.einsum("bshn,hnl->bshl", q[..., :nope].abs(), w_uk.abs())
    q_rope, q_size = rotated(q[..., nope:], cos[:, :, None], sin[:, :, None])
    k_rope, k_size = rotated(kv[..., rank:], cos, sin)
    c = kv[..., :rank]
    latent = c / (c.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    queries = torch.cat([absorbed, q_rope], -1), torch.cat([size, q_size], -1)
    return queries, (torch.cat([latent, k_rope], -1), torch.cat([latent.abs(), k_size], -1))


@pytest.mark.parametrize(PARAMETERS, CASES)
def test_makes_queries_and_latents(
    dtype, batch, seq, heads, rank, rope, nope, width, sm, device, use_tiles, poison_new_memory, assert_within
):
    use_tiles(sm, query)
    operands = query_operands(dtype, batch, seq, heads, rank, rope, nope, device)
    for actual, expected in zip(query.run(*operands, EPS), expected_query(*operands), strict=True):
        assert_within(actual, *expected, ULPS[dtype], RMS_ULPS[dtype])


@pytest.mark.parametrize(PARAMETERS, CASES)
def test_makes_values(
    dtype, batch, seq, heads, rank, rope, nope, width, sm, device, use_tiles, poison_new_memory, assert_within
):
    use_tiles(sm, value)
    torch.manual_seed(0)
    attended, w_uv = torch.randn(batch, seq, heads, rank), torch.randn(heads, width, rank) / rank**0.5
    attended, w_uv = (t.to(dtype).to(device) for t in (attended, w_uv))
    x, w = attended.cpu().double(), w_uv.cpu().double()
    expected = [torch.einsum("bshl,hvl->bshv", *pair).flatten(2) for pair in ((x, w), (x.abs(), w.abs()))]
    assert_within(value.run(attended, w_uv), *expected, ULPS[dtype], RMS_ULPS[dtype])


def test_neither_touches_foreign_memory(device, memory_watch):
    operands = query_operands(F32, 3, 1, 2, 20, 4, 12, device)
    query.run(*operands, EPS)
    value.run(torch.randn(3, 1, 2, 20, device=device), torch.randn(2, 10, 20, device=device))


def test_the_references_are_the_models_attention(monkeypatch):
    """What the model hands to MlaDecode, and what it makes of its output, from the same projections."""
    config = ModelConfig(
        hidden_size=32,
        num_attention_heads=2,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        n_routed_experts=0,
    )
    torch.manual_seed(0)
    attention = Attention(config)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    x, angles = torch.randn(6, 32), torch.rand(2, 3, 2)
    cos, sin, seen = angles.cos(), angles.sin(), []

    def decode(given, latent, past, *rest):
        seen.extend([given, latent])
        return given[..., :24] * 2, past

    monkeypatch.setattr("deepseek_trt.export.model.mla_decode", decode)
    output, _ = attention.decode(x, cos, sin, *[torch.zeros(1)] * 4)
    q, kv = attention.q_proj(x), attention.kv_a_proj_with_mqa(x)
    made = mla_query(q, kv, cos, sin, attention.kv_a_layernorm.weight, attention.w_uk, attention.kv_a_layernorm.eps)
    torch.testing.assert_close(made, tuple(seen))
    values = mla_value(seen[0][..., :24] * 2, attention.w_uv)
    torch.testing.assert_close(attention.o_proj(values.flatten(0, 1)), output)
