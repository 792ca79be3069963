"""Every kernel at the published models' sizes against torch: as Triton compiles it here, as cubin, and as PTX."""

from __future__ import annotations

import pytest
import torch

from deepseek_trt.export.ops.mla_decode import mla_decode as decode_reference
from deepseek_trt.export.ops.mla_prefill import mla_prefill as prefill_reference
from deepseek_trt.export.ops.moe_biased_router import moe_biased_router as biased_reference
from deepseek_trt.export.ops.moe_experts import moe_experts as experts_reference
from deepseek_trt.export.ops.moe_router import moe_router as router_reference
from deepseek_trt.plugins.fused.mla_query import mla_query
from deepseek_trt.plugins.fused.mla_value import mla_value
from deepseek_trt.plugins.kernels import KERNEL_OPS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}
PAGE = 64

# Of the result as a whole, in ulps of its dtype. In 16 bits weights, intermediates and output are rounded about once
# each (half an ulp); float32's figure is the accumulation of some thousand products, in the reference as well.
RMS_ULPS = {F32: 64.0, F16: 1.5, BF16: 1.5}
# Of the worst element, against the largest of the result: what a missed tile or a stray page would exceed by far.
MAX_ULPS = {F32: 512.0, F16: 8.0, BF16: 8.0}


def assert_close(actual, expected, dtype):
    assert actual.isfinite().all()
    error, eps = (actual.float() - expected.float()).abs(), torch.finfo(dtype).eps
    assert error.norm() <= RMS_ULPS[dtype] * eps * expected.float().norm()
    assert error.max() <= MAX_ULPS[dtype] * eps * expected.float().abs().max()


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def paged(lengths, capacity, width, dtype):
    """A pool of random rows, NaN where nothing is cached, and a table with pages in random order."""
    entries = -(-capacity // PAGE)
    table = (torch.randperm(len(lengths) * entries, device="cuda") + 1).view(len(lengths), entries).int()
    pool = random(len(lengths) * entries + 1, PAGE, width, dtype=dtype)
    slots = torch.arange(entries * PAGE, device="cuda").view(entries, PAGE)
    for row, length in enumerate(lengths):
        pool[table[row].long()] = torch.where((slots < length)[..., None], pool[table[row].long()], torch.nan)
    pool[0] = torch.nan
    return pool, table, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def widened(*tensors):
    return [t.float() if t.is_floating_point() else t for t in tensors]


@pytest.fixture(autouse=True)
def seeded(gpu):
    torch.manual_seed(0)
    assert not torch.backends.cuda.matmul.allow_tf32, "the references need full precision"


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=NAMES.get)
@pytest.mark.parametrize("model", ["v2-lite", "v2"])
@pytest.mark.parametrize("new", [1, 5, 8])
@pytest.mark.parametrize("lengths", [(0,), (1, 63, 64, 65), (4095, 0, 700), (20_000,)], ids=str)
def test_mla_decode(model, dtype, lengths, new, config_of, use_kernels):
    config = config_of(model)
    use_kernels(config, NAMES[dtype], "MlaDecode")
    pool, table, past = paged(lengths, max(lengths) + new, config.latent_dim, dtype)
    query = random(len(lengths), new, config.num_attention_heads, config.latent_dim, dtype=dtype)
    latent = random(len(lengths), new, config.latent_dim, dtype=dtype)
    counts = torch.tensor([1 + row * 3 % new for row in range(len(lengths))], dtype=torch.int32, device="cuda")
    given, numbers = (query, latent, pool, table, past, counts), (config.softmax_scale, config.kv_lora_rank)
    attended, present = KERNEL_OPS["MlaDecode"](*given, *numbers)
    expected, expected_pool = decode_reference(*widened(*given), *numbers)
    for row, count in enumerate(counts.tolist()):
        assert_close(attended[row, :count], expected[row, :count], dtype)
    assert torch.equal(present[1:].float().nan_to_num(9.0), expected_pool[1:].nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=NAMES.get)
@pytest.mark.parametrize("model", ["v2-lite", "v2"])
@pytest.mark.parametrize(("past", "new"), [((0,), (1,)), ((0, 5, 130), (129, 64, 7)), ((1000,), (333,))], ids=str)
def test_mla_prefill(model, dtype, past, new, config_of, use_kernels):
    config = config_of(model)
    use_kernels(config, NAMES[dtype], "MlaPrefill")
    heads, rank, steps = config.num_attention_heads, config.kv_lora_rank, max(new) + 3
    pool, table, past_lengths = paged(
        past, max(p + n for p, n in zip(past, new, strict=True)) + 3, config.latent_dim, dtype
    )
    given = (
        random(len(past), steps, heads, config.qk_head_dim, dtype=dtype),
        random(len(past), steps, config.latent_dim, dtype=dtype),
        pool,
        table,
        past_lengths,
        torch.tensor(new, dtype=torch.int32, device="cuda"),
        random(heads, config.qk_nope_head_dim, rank, dtype=dtype, scale=rank**-0.5),
        random(heads, config.v_head_dim, rank, dtype=dtype, scale=rank**-0.5),
    )
    attended, present = KERNEL_OPS["MlaPrefill"](*given, config.softmax_scale)
    expected, expected_pool = prefill_reference(*widened(*given), config.softmax_scale)
    for row, count in enumerate(new):
        assert_close(attended[row, :count], expected[row, :count], dtype)
    assert torch.equal(present[1:].float().nan_to_num(9.0), expected_pool[1:].nan_to_num(9.0))


@pytest.mark.parametrize("model", ["v2-lite", "v2"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 1000])
def test_moe_router(model, tokens, config_of, use_kernels):
    config = config_of(model)
    use_kernels(config, "bfloat16", "MoeRouter")
    groups = (config.n_group, config.topk_group) if config.topk_method == "group_limited_greedy" else (1, 1)
    given = (random(tokens, config.n_routed_experts, dtype=F32), config.num_experts_per_tok, *groups)
    weights, ids = KERNEL_OPS["MoeRouter"](*given, int(config.norm_topk_prob), config.routed_scaling_factor)
    expected, expected_ids = router_reference(*given, int(config.norm_topk_prob), config.routed_scaling_factor)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=0)  # exp, a sum, a division: a few roundings each


@pytest.mark.parametrize("tokens", [1, 5, 64, 1000])
def test_moe_biased_router(tokens, config_of, use_kernels):
    config = config_of("v3")
    use_kernels(config, "bfloat16", "MoeBiasedRouter")
    bias = random(config.n_routed_experts, dtype=F32, scale=0.1)
    given = (random(tokens, config.n_routed_experts, dtype=F32), bias, config.num_experts_per_tok)
    rest = (*config.routing_groups, int(config.norm_topk_prob), config.routed_scaling_factor)
    weights, ids = KERNEL_OPS["MoeBiasedRouter"](*given, *rest)
    expected, expected_ids = biased_reference(*given, *rest)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=NAMES.get)
@pytest.mark.parametrize("model", ["v2-lite", "v2"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 300, 2000])
def test_moe_experts(model, dtype, tokens, config_of, use_kernels):
    config = config_of(model)
    experts, hidden, inter = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    needed = 3 * experts * hidden * inter * dtype.itemsize * 1.2 + 2**30
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{model}'s experts in {NAMES[dtype]} need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    use_kernels(config, NAMES[dtype], "MoeExperts")
    ids = torch.rand(tokens, experts, device="cuda").topk(config.num_experts_per_tok).indices.int()
    stacks = [
        random(experts, *shape, dtype=dtype, scale=shape[1] ** -0.5)
        for shape in ((inter, hidden), (inter, hidden), (hidden, inter))
    ]
    x, weights = random(tokens, hidden, dtype=dtype), torch.rand(tokens, ids.shape[1], device="cuda")
    actual = KERNEL_OPS["MoeExperts"](x, weights, ids, *stacks, "silu")
    assert_close(actual, in_float32(x, weights, ids, stacks), dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=NAMES.get)
@pytest.mark.parametrize("model", ["v2-lite", "v2"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_moe_layer(model, dtype, tokens, config_of, use_kernels):
    from deepseek_trt.plugins.kernels.moe import layer  # not before the interpreter's tests had the chance to enable it

    config = config_of(model)
    experts, hidden, inter = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    shared = config.n_shared_experts * inter
    needed = 3 * (experts * inter + shared) * hidden * dtype.itemsize * 1.2 + 2**30
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{model}'s experts in {NAMES[dtype]} need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    use_kernels(config, NAMES[dtype], "MoeLayer")
    shapes = [(experts, inter, hidden)] * 2 + [(experts, hidden, inter)] + [(shared, hidden)] * 2 + [(hidden, shared)]
    stacks = [random(*shape, dtype=dtype, scale=shape[-1] ** -0.5) for shape in shapes]
    x, router = random(tokens, hidden, dtype=dtype), random(experts, hidden, dtype=dtype, scale=hidden**-0.5)
    choice = (config.num_experts_per_tok, *config.routing_groups, int(config.norm_topk_prob))
    choice = (*choice, config.routed_scaling_factor)
    actual = layer.run(x, router, torch.zeros(experts, device="cuda"), *stacks, *choice, 0)
    weights, ids = router_reference(x.float() @ router.float().T, *choice)
    gate, up, down = (stack.float() for stack in stacks[3:])
    added = torch.nn.functional.linear(torch.nn.functional.silu(x.float() @ gate.T) * (x.float() @ up.T), down)
    assert_close(actual, in_float32(x, weights, ids, stacks[:3]) + added, dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=NAMES.get)
@pytest.mark.parametrize("model", ["v2-lite", "v2"])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (4, 8), (300, 1)])
def test_mla_query_and_value(model, dtype, batch, seq, config_of, use_kernels):
    from deepseek_trt.plugins.kernels.absorbed import query, value

    config = config_of(model)
    heads, rank, rope, nope = (
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
    )
    use_kernels(config, NAMES[dtype], "MlaQuery")
    use_kernels(config, NAMES[dtype], "MlaValue")
    angles = torch.rand(batch, seq, rope // 2, device="cuda") * 6
    q, kv = random(batch * seq, heads * (nope + rope), dtype=dtype), random(batch * seq, rank + rope, dtype=dtype)
    norm, w_uk = random(rank, dtype=dtype), random(heads, nope, rank, dtype=dtype, scale=nope**-0.5)
    w_uv = random(heads, config.v_head_dim, rank, dtype=dtype, scale=rank**-0.5)
    made = query.run(q, kv, angles.cos(), angles.sin(), norm, w_uk, 1e-6)
    expected = mla_query(*widened(q, kv, angles.cos(), angles.sin(), norm, w_uk), 1e-6)
    for actual, exact in zip(made, expected, strict=True):
        assert_close(actual, exact, dtype)
    attended = random(batch, seq, heads, rank, dtype=dtype)
    assert_close(value.run(attended, w_uv), mla_value(*widened(attended, w_uv)), dtype)


def in_float32(x, weights, ids, stacks):
    """The reference, one expert's weights widened at a time."""
    total = torch.zeros_like(x, dtype=F32)
    for expert in ids.unique().tolist():
        chosen = (ids == expert).any(1)
        share = (weights * (ids == expert))[chosen].sum(1, keepdim=True)
        one = [stack[expert : expert + 1].float() for stack in stacks]
        only = torch.zeros(int(chosen.sum()), 1, dtype=torch.int32, device="cuda")
        total[chosen] += experts_reference(x[chosen].float(), share, only, *one, "silu")
    return total
