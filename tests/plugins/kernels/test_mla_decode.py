"""MlaDecode's kernels against float64, with everything poisoned that they must not read."""

import pytest
import torch

from deepseek_trt.plugins.kernels import chips, mla_decode

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Element by element: the weights (half an ulp) and the output (half an ulp) are rounded to the dtype once each; what is
# left is float32's error in the scores. In float32 that is all: about sqrt(D) roundings a score, and exp2's own.
ULPS = {F32: 8.0, F16: 1.25, BF16: 1.1}
RMS_ULPS = {F32: 4.0, F16: 0.6, BF16: 0.6}

CASES = [  # dtype, heads, rank, rope, page, lengths of the cache, tiles of
    (F32, 4, 64, 16, 64, (0,), chips.INTERPRETER),
    (F32, 20, 64, 16, 16, (1, 0, 47), chips.INTERPRETER),
    (F32, 20, 32, 16, 5, (1, 0, 33), 86),
    (F16, 4, 64, 16, 64, (63, 64, 65), chips.INTERPRETER),
    (F16, 20, 64, 32, 16, (0, 140), 90),
    (BF16, 4, 64, 16, 64, (0, 1, 70), chips.INTERPRETER),
    (BF16, 20, 128, 64, 16, (31, 2), 86),
    (BF16, 3, 48, 8, 7, (20, 0), 90),
]


def make_operands(make_pages, dtype, heads, rank, rope, page, lengths, device):
    torch.manual_seed(0)
    width = rank + rope
    pages = make_pages(dtype, lengths, [1] * len(lengths), width, page, device)
    query = torch.randn(len(lengths), heads, width).to(dtype).to(device)
    latent = torch.randn(len(lengths), 1, width).to(dtype).to(device)
    return pages, query, latent


def expected_attention(pages, query, latent, scale, rank):
    """The output in float64, and the same with all terms positive."""
    outputs, magnitudes = [], []
    for row, past in enumerate(pages.lengths):
        tokens = torch.cat([pages.tokens[row].double(), latent[row].cpu().double()])
        assert len(tokens) == past + 1
        weights = (query[row].cpu().double() @ tokens.T * scale).softmax(-1)
        outputs.append(weights @ tokens[:, :rank])
        magnitudes.append(weights @ tokens[:, :rank].abs())
    return torch.stack(outputs), torch.stack(magnitudes)


@pytest.mark.parametrize(("dtype", "heads", "rank", "rope", "page", "lengths", "sm"), CASES)
def test_attends_to_cached_tokens_only(
    dtype, heads, rank, rope, page, lengths, sm, device, make_pages, use_tiles, assert_within
):
    use_tiles(sm, mla_decode)
    pages, query, latent = make_operands(make_pages, dtype, heads, rank, rope, page, lengths, device)
    attended, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, 0.15, rank)
    expected, magnitude = expected_attention(pages, query, latent, 0.15, rank)
    assert_within(attended, expected, magnitude, ULPS[dtype], RMS_ULPS[dtype])
    for row, past in enumerate(lengths):
        assert torch.equal(pages.read(present, row, past + 1)[-1], latent[row, 0].cpu().double())


def test_changes_one_slot_a_row(device, make_pages):
    pages, query, latent = make_operands(make_pages, F32, 4, 16, 16, 16, (0, 16, 20), device)
    before = pages.pool.clone()
    _, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, 1.0, 16)
    assert torch.equal(pages.pool.nan_to_num(9.0), before.nan_to_num(9.0)), "the input pool was written"
    changed = (present.nan_to_num(9.0) != before.nan_to_num(9.0)).any(-1)
    assert changed.sum() == 3


@pytest.mark.parametrize("splits", [1, 2, 5, 128])
def test_splits_agree(splits, device, make_pages, monkeypatch, use_tiles, poison_new_memory, assert_within):
    """Short sequences use fewer splits than there are; the workspace of the others is never read."""
    use_tiles(86, mla_decode)
    monkeypatch.setattr(mla_decode, "decode_splits", lambda *sizes: splits)
    pages, query, latent = make_operands(make_pages, F32, 4, 32, 16, 32, (270, 0, 127), device)
    attended, _ = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, 0.3, 32)
    expected, magnitude = expected_attention(pages, query, latent, 0.3, 32)
    assert_within(attended, expected, magnitude, ULPS[F32], RMS_ULPS[F32])


def test_large_scores_do_not_overflow(device, make_pages, assert_within):
    pages, query, latent = make_operands(make_pages, F32, 4, 32, 16, 16, (40,), device)
    attended, _ = mla_decode.run(query * 100, latent, pages.pool, pages.table, pages.past, 10.0, 32)
    expected, magnitude = expected_attention(pages, query * 100, latent, 10.0, 32)
    # scores of some 10,000: their float32 rounding alone moves a weight by 1e-3
    assert_within(attended, expected, magnitude, 1e5, 1e5)
