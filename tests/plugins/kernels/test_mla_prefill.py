"""MlaPrefill's kernels against float64, with everything poisoned that they must not read."""

import pytest
import torch

from deepseek_trt.plugins.kernels import chips, mla_prefill

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Weights, values and output are rounded to the dtype once each (half an ulp each), and so are the keys, whose rounding
# moves a score by a few tenths of an ulp here. In float32: about sqrt(L) + sqrt(N + R) roundings a score.
ULPS = {F32: 16.0, F16: 2.5, BF16: 2.5}
RMS_ULPS = {F32: 8.0, F16: 1.0, BF16: 1.0}

CASES = [  # dtype, heads, rank, rope, nope, value, page, past, new, tiles of
    (F32, 4, 64, 16, 32, 32, 64, (0,), (1,), chips.INTERPRETER),
    (F32, 3, 32, 16, 32, 16, 16, (0, 1, 30), (7, 3, 1), chips.INTERPRETER),
    (F32, 2, 48, 16, 24, 40, 5, (3, 11), (40, 2), 86),
    (F16, 4, 64, 16, 32, 32, 64, (60, 0), (9, 5), chips.INTERPRETER),
    (F16, 2, 64, 16, 64, 128, 16, (0, 40), (33, 1), 90),
    (BF16, 4, 64, 16, 32, 32, 16, (17, 0, 5), (5, 12, 1), chips.INTERPRETER),
    (BF16, 1, 64, 32, 128, 64, 16, (5, 0), (130, 1), 86),
]


def make_operands(make_pages, dtype, heads, rank, rope, nope, value, page, past, new, device, padding=3):
    torch.manual_seed(0)
    batch, steps, width = len(past), max(new) + padding, rank + rope
    pages = make_pages(dtype, past, new, width, page, device)
    operands = {
        "query": torch.randn(batch, steps, heads, nope + rope),
        "latent": torch.randn(batch, steps, width),
        "w_uk": torch.randn(heads, nope, rank) / rank**0.5,
        "w_uv": torch.randn(heads, value, rank) / rank**0.5,
    }
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in operands.items()}
    tensors["sequence_lengths"] = torch.tensor(new, dtype=torch.int32, device=device)
    return pages, tensors


def run(pages, x, scale):
    return mla_prefill.run(
        x["query"],
        x["latent"],
        pages.pool,
        pages.table,
        pages.past,
        x["sequence_lengths"],
        x["w_uk"],
        x["w_uv"],
        scale,
    )


def expected_attention(pages, x, scale):
    """Of all real queries, one after the other: the output [n, H * V] in float64, and with all terms positive."""
    x = {name: tensor.cpu().double() for name, tensor in x.items()}
    nope, rank = x["w_uk"].shape[1:]
    outputs, magnitudes = [], []
    for row, past in enumerate(pages.lengths):
        new = int(x["sequence_lengths"][row])
        tokens = torch.cat([pages.tokens[row].double(), x["latent"][row, :new]])
        keys = torch.einsum("tl,hnl->thn", tokens[:, :rank], x["w_uk"])
        values = torch.einsum("tl,hvl->thv", tokens[:, :rank], x["w_uv"])
        sizes = torch.einsum("tl,hvl->thv", tokens[:, :rank].abs(), x["w_uv"].abs())
        for step in range(new):
            seen, query = past + step + 1, x["query"][row, step]
            scores = torch.einsum("hn,thn->ht", query[:, :nope], keys[:seen]) + query[:, nope:] @ tokens[:seen, rank:].T
            weights = (scores * scale).softmax(-1)
            outputs.append(torch.einsum("ht,thv->hv", weights, values[:seen]).flatten())
            magnitudes.append(torch.einsum("ht,thv->hv", weights, sizes[:seen]).flatten())
    return torch.stack(outputs), torch.stack(magnitudes)


def real_rows(attended, x):
    lengths = x["sequence_lengths"].cpu()
    return attended.cpu()[torch.arange(attended.shape[1]) < lengths[:, None]]


@pytest.mark.parametrize(
    ("dtype", "heads", "rank", "rope", "nope", "value", "page", "past", "new", "sm"),
    CASES,
)
def test_attends_causally_to_cache_and_new_tokens(
    dtype, heads, rank, rope, nope, value, page, past, new, sm, device, make_pages, use_tiles, assert_within
):
    use_tiles(sm, mla_prefill)
    pages, x = make_operands(make_pages, dtype, heads, rank, rope, nope, value, page, past, new, device)
    attended, present = run(pages, x, (nope + rope) ** -0.5)
    expected, magnitude = expected_attention(pages, x, (nope + rope) ** -0.5)
    assert attended.isfinite().all(), "padding rows must be finite too"
    assert_within(real_rows(attended, x), expected, magnitude, ULPS[dtype], RMS_ULPS[dtype])
    for row, (cached, fresh) in enumerate(zip(past, new, strict=True)):
        written = pages.read(present, row, cached + fresh)[cached:]
        assert torch.equal(written, x["latent"][row, :fresh].cpu().double())


def test_a_row_without_tokens_gives_zeros(device, make_pages, poison_new_memory):
    pages, x = make_operands(make_pages, F32, 2, 16, 16, 16, 16, 16, (0, 4), (0, 2), device)
    attended, _ = run(pages, x, 0.2)
    assert torch.count_nonzero(attended[0]) == 0
    assert attended.isfinite().all()


def test_heads_in_chunks_give_the_same_bits(device, make_pages, monkeypatch):
    pages, x = make_operands(make_pages, F32, 5, 32, 16, 16, 16, 16, (3, 0), (6, 9), device)
    whole, _ = run(pages, x, 0.2)
    monkeypatch.setattr(mla_prefill, "prefill_chunk_heads", lambda *sizes: 2)
    chunked, _ = run(pages, x, 0.2)
    assert torch.equal(whole, chunked)


def test_a_prompt_in_two_calls_equals_one(device, make_pages, assert_within):
    pages, x = make_operands(make_pages, F32, 2, 32, 16, 16, 16, 4, (0,), (11,), device, padding=0)
    whole, _ = run(pages, x, 0.2)
    first = {**x, "query": x["query"][:, :6], "latent": x["latent"][:, :6]}
    first["sequence_lengths"] = torch.full_like(x["sequence_lengths"], 6)
    _, pages.pool = run(pages, first, 0.2)
    second = {**x, "query": x["query"][:, 6:], "latent": x["latent"][:, 6:]}
    second["sequence_lengths"] = torch.full_like(x["sequence_lengths"], 5)
    pages.past = torch.full_like(pages.past, 6)
    rest, _ = run(pages, second, 0.2)
    assert_within(rest, whole[:, 6:].cpu().double(), whole[:, 6:].abs().cpu().double() + 0.1, 8.0, 4.0)
