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


@pytest.mark.parametrize("new", [(1, 1, 1), (3, 0, 8), (20, 7, 2)])
def test_changes_the_new_tokens_slots_only(new, device, make_pages, use_tiles):
    """Padding goes nowhere; more than eight new tokens a row are stored, too."""
    use_tiles(86, mla_decode)
    pages, query, latent, counts = make_operands(make_pages, F32, 4, 16, 16, 16, (0, 16, 20), new, device)
    before = pages.pool.clone()
    _, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, counts, 1.0, 16)
    assert torch.equal(pages.pool.nan_to_num(9.0), before.nan_to_num(9.0)), "the input pool was written"
    changed = (present.nan_to_num(9.0) != before.nan_to_num(9.0)).any(-1)
    assert changed.sum() == sum(new)


@pytest.mark.parametrize(("dtype", "sm"), [(F32, 86), (F16, 90), (BF16, 90)])
def test_a_new_token_counts_as_a_cached_one(dtype, sm, device, make_pages, use_tiles):
    """Bit for bit, whether it is read from `latent` or, once it is stored and counted as cached, from the pages."""
    use_tiles(sm, mla_decode)
    lengths = (0, 31, 32, 300)
    operands = make_operands(make_pages, dtype, 20, 64, 16, 16, lengths, (1, 1, 1, 1), device)
    pages, query, latent, new = operands
    attended, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, new, 0.3, 64)
    gone = torch.full_like(latent, torch.nan)
    again, kept = mla_decode.run(query, gone, present, pages.table, pages.past + 1, torch.zeros_like(new), 0.3, 64)
    assert torch.equal(attended, again)
    assert torch.equal(kept.nan_to_num(9.0), present.nan_to_num(9.0))


def test_a_row_of_padding_reads_no_page(device, make_pages):
    """It has neither cached nor new tokens, and pages of NaN in its table."""
    pages, query, latent, new = make_operands(make_pages, F16, 4, 16, 16, 16, (0, 5), (0, 1), device)
    pages.table[0] = 0
    attended, present = mla_decode.run(query, latent, pages.pool, pages.table, pages.past, new, 1.0, 16)
    assert attended.isfinite().all()
    assert present[0].isnan().all(), "the scratch page was written"


def test_no_program_needs_anothers_stores(device, make_pages, use_tiles, note_accesses, monkeypatch):
    """No address is stored to by two programs of a launch, or stored to by one and read by another."""
    if device.type == "cuda":
        pytest.skip("the interpreter is what watches memory here")
    use_tiles(86, mla_decode)
    monkeypatch.setattr(mla_decode, "decode_parts", lambda *sizes: 9)
    # tiles of 16 queries and 16 tokens: new ones in two tiles, two pieces and two pages, and six tiles of queries
    pages, query, latent, new = make_operands(make_pages, F32, 12, 32, 16, 32, (60, 0, 125), (8, 1, 8), device)
    mla_decode.run(query, latent, pages.pool, pages.table, pages.past, new, 0.3, 32)
    assert len(note_accesses) == 2
    for loads, stores in note_accesses:
        written = [address for addresses in stores.values() for address in addresses]
        assert len(written) == len(set(written)), "stored to twice"
        assert not set(written) & set().union(*loads.values()), "read and stored to"


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
