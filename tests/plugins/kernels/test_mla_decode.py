"""MlaDecode's kernels against float64, with everything poisoned that they must not read."""

import pytest
import torch

from deepseek_trt.plugins.kernels import chips, mla_decode

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Element by element: the weights (half an ulp) and the output (half an ulp) are rounded to the dtype once each; what is
# left is float32's error in the scores. In float32 that is all: about sqrt(D) roundings a score, and exp2's own.
ULPS = {F32: 8.0, F16: 1.25, BF16: 1.1}
RMS_ULPS = {F32: 4.0, F16: 0.6, BF16: 0.6}

CASES = [  # dtype, heads, rank, rope, page, lengths of the cache, new tokens, tiles of
    (F32, 4, 64, 16, 64, (0,), (1,), chips.INTERPRETER),
    (F32, 20, 64, 16, 16, (1, 0, 47), (1, 1, 1), chips.INTERPRETER),
    (F32, 20, 32, 16, 5, (1, 0, 33), (1, 1, 1), 86),
    (F16, 4, 64, 16, 64, (63, 64, 65), (1, 1, 1), chips.INTERPRETER),
    (F16, 20, 64, 32, 16, (0, 140), (1, 1), 90),
    (BF16, 4, 64, 16, 64, (0, 1, 70), (1, 1, 1), chips.INTERPRETER),
    (BF16, 20, 128, 64, 16, (31, 2), (1, 1), 86),
    (BF16, 3, 48, 8, 7, (20, 0), (1, 1), 90),
    (F32, 4, 64, 16, 16, (0, 15, 47), (8, 3, 5), chips.INTERPRETER),
    (F32, 20, 32, 16, 5, (1, 0, 330), (2, 8, 1), 86),  # a split ends between two new tokens
    (F16, 3, 48, 8, 7, (20, 0, 13), (4, 1, 8), 90),
    (BF16, 20, 128, 64, 16, (31, 2), (7, 8), 90),
    (BF16, 16, 64, 16, 64, (63, 60), (8, 8), 86),
    (F16, 20, 64, 16, 64, (200, 0, 1, 130), (1, 1, 1, 1), 90),  # tiles within a page: its number is carried along
    (BF16, 20, 32, 16, 32, (300, 31), (3, 8), 86),
    (BF16, 4, 32, 16, 48, (95, 47), (1, 2), 86),  # pages of three tiles
]


def make_operands(make_pages, dtype, heads, rank, rope, page, lengths, new, device):
    torch.manual_seed(0)
    width = rank + rope
    pages = make_pages(dtype, lengths, new, width, page, device)
    query = torch.randn(len(lengths), max(new), heads, width).to(dtype).to(device)
    latent = torch.randn(len(lengths), max(new), width).to(dtype).to(device)
    return pages, query, latent, torch.tensor(new, dtype=torch.int32, device=device)


def expected_attention(pages, query, latent, new, scale, rank):
    """The real tokens' output in float64, and the same with all terms positive."""
    outputs, magnitudes = [], []
    for row, count in enumerate(new):
        for step in range(int(count)):
            tokens = torch.cat([pages.tokens[row].double(), latent[row, : step + 1].cpu().double()])
            weights = (query[row, step].cpu().double() @ tokens.T * scale).softmax(-1)
            outputs.append(weights @ tokens[:, :rank])
            magnitudes.append(weights @ tokens[:, :rank].abs())
    return torch.stack(outputs), torch.stack(magnitudes)


def real(attended, new):
    """The rows that are no padding; padding's are finite."""
    assert attended.isfinite().all()
    return torch.cat([row[: int(count)] for row, count in zip(attended, new, strict=True)])


@pytest.mark.parametrize(("dtype", "heads", "rank", "rope", "page", "lengths", "new", "sm"), CASES)
def test_attends_to_cached_tokens_only(
    dtype, heads, rank, rope, page, lengths, new, sm, device, make_pages, use_tiles, assert_within
):
    use_tiles(sm, mla_decode)
    pages, query, latent, counts = make_operands(make_pages, dtype, heads, rank, rope, page, lengths, new, device)
    attended, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, counts, 0.15, rank)
    expected, magnitude = expected_attention(pages, query, latent, new, 0.15, rank)
    assert_within(real(attended, new), expected, magnitude, ULPS[dtype], RMS_ULPS[dtype])
    for row, (past, count) in enumerate(zip(lengths, new, strict=True)):
        assert torch.equal(pages.read(present, row, past + count)[past:], latent[row, :count].cpu().double())


def test_changes_one_slot_a_row(device, make_pages):
    pages, query, latent, new = make_operands(make_pages, F32, 4, 16, 16, 16, (0, 16, 20), (1, 1, 1), device)
    before = pages.pool.clone()
    _, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, new, 1.0, 16)
    assert torch.equal(pages.pool.nan_to_num(9.0), before.nan_to_num(9.0)), "the input pool was written"
    changed = (present.nan_to_num(9.0) != before.nan_to_num(9.0)).any(-1)
    assert changed.sum() == 3


@pytest.mark.parametrize("new", [(1, 1, 1), (8, 2, 8)])
@pytest.mark.parametrize("parts", [1, 2, 5, 128])
def test_pieces_agree(parts, new, device, make_pages, monkeypatch, use_tiles, poison_new_memory, assert_within):
    """Whatever the number of pieces; the workspace that none has is never read."""
    use_tiles(86, mla_decode)
    monkeypatch.setattr(mla_decode, "decode_parts", lambda *sizes: parts)
    pages, query, latent, counts = make_operands(make_pages, F32, 4, 32, 16, 32, (252, 0, 127), new, device)
    attended, _ = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, counts, 0.3, 32)
    expected, magnitude = expected_attention(pages, query, latent, new, 0.3, 32)
    assert_within(real(attended, new), expected, magnitude, ULPS[F32], RMS_ULPS[F32])


def test_large_scores_do_not_overflow(device, make_pages, assert_within):
    pages, query, latent, new = make_operands(make_pages, F32, 4, 32, 16, 16, (40,), (1,), device)
    attended, _ = mla_decode.run(query * 100, latent, pages.pool, pages.table, pages.past, new, 10.0, 32)
    expected, magnitude = expected_attention(pages, query * 100, latent, (1,), 10.0, 32)
    # scores of some 10,000: their float32 rounding alone moves a weight by 1e-3
    assert_within(real(attended, (1,)), expected, magnitude, 1e5, 1e5)
