"""The kernels over a narrow cache: codes and scales to the bit, attention as the whole kernels' over what they are.

mla_decode.py's and mla_prefill.py's own tests hold those against float64.
"""

import itertools

import pytest
import torch

from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.ops import paging
from deepseek_trt.export.ops.cache import codes
from deepseek_trt.plugins.kernels import chips, mla_decode, mla_prefill
from deepseek_trt.plugins.kernels.cache import constants, decode, prefill, write
from deepseek_trt.plugins.kernels.tiles import prefill_expand_tile

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}
FORMATS = ("int8", "fp8")
FAR = 1 << 28  # an entry of a page table that is not used


def group_of(rank):
    return 128 if rank % 128 == 0 else rank


def make_pools(dtype, cache, rope, page, lengths, new, device):
    """Both pools, of NaN and of 127 where no token lies, with cached tokens of all sizes; page table and lengths."""
    torch.manual_seed(0)
    entries = [-(-(past + more) // page) for past, more in zip(lengths, new, strict=True)]
    table = torch.full((len(lengths), max(entries) + 2), FAR, dtype=torch.int32)
    pages = iter((torch.randperm(sum(entries)) + 1).tolist())  # page 0 is scratch
    for row, count in enumerate(entries):
        table[row, :count] = torch.tensor(list(itertools.islice(pages, count)), dtype=torch.int32)
    pools = (
        torch.full((sum(entries) + 1, page, cache.rank), 127, dtype=torch.int8),
        torch.full((sum(entries) + 1, page, rope + cache.groups), torch.nan, dtype=dtype),
    )
    for row, past in enumerate(lengths):
        tokens = latents_of(dtype, past, cache.rank + rope)
        places = [(int(table[row, t // page]), t % page) for t in range(past)]
        for at, code, rest in zip(places, *codes.narrowed(tokens, cache.rank, cache.format, cache.group), strict=True):
            pools[0][at], pools[1][at] = code, rest
    given = (*pools, table, torch.tensor(lengths, dtype=torch.int32), torch.tensor(new, dtype=torch.int32))
    return tuple(tensor.to(device) for tensor in given)


def latents_of(dtype, count, width):
    """Of all sizes, from ones that have no scale to ones near the largest of float16."""
    sizes = 10.0 ** torch.randint(-9, 5, (count, 1)).float()
    return (torch.randn(count, width) * sizes).clamp(-6e4, 6e4).to(dtype)


def new_latents(dtype, new, width, device):
    return torch.stack([latents_of(dtype, max(new), width) for _ in new]).to(device)


def bits(pools):
    return tuple(pool.view(torch.int8) if pool.dtype == torch.int8 else pool.nan_to_num(9.0) for pool in pools)


def same(first, second):
    return all(map(torch.equal, bits(first), bits(second)))


def whole_of(pools, cache):
    """A whole cache's pool of the same numbers."""
    return codes.widened(*pools, cache.format, cache.group)


WRITES = [(F32, 16, 8, 16), (F16, 24, 4, 5), (BF16, 256, 64, 64), (F32, 384, 16, 64)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "rank", "rope", "page"), WRITES)
@pytest.mark.parametrize("sm", [chips.INTERPRETER, 86])
def test_writes_the_reference_bits(dtype, rank, rope, page, format, sm, device, use_tiles):
    use_tiles(sm, write)
    cache = NarrowCache(format, rank, group_of(rank))
    new = (1, 9, 0)
    *pools, table, past, counts = make_pools(dtype, cache, rope, page, (0, page - 3, 7), new, device)
    latent = new_latents(dtype, new, rank + rope, device)
    made = write.write(tuple(pools), latent, table, past, counts, cache)
    rows = codes.narrowed(latent, rank, format, cache.group)
    reachable = table.clamp(max=pools[0].shape[0] - 1)
    expected = [paging.write_latents(p, r, reachable, past, counts) for p, r in zip(pools, rows, strict=True)]
    assert same([pool[1:] for pool in made], [pool[1:] for pool in expected])  # beside scratch


def test_every_ratio_rounds_as_torch_rounds(device):
    """fp8: all ties, all codes and their neighbours, in one group whose scale is 1."""
    cache = NarrowCache("fp8", 2048, 2048)
    every = torch.arange(-128, 128, dtype=torch.int8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    numbers = torch.cat([finite, middles, middles.nextafter(finite[1:]), middles.nextafter(finite[:-1])])
    latent = torch.zeros(1, 1, 2048 + 4)
    latent[0, 0, : len(numbers)] = numbers  # the largest is 448
    *pools, table, past, counts = make_pools(F32, cache, 4, 16, (0,), (1,), device)
    made, rest = write.write(tuple(pools), latent.to(device), table, past, counts, cache)
    assert rest[table[0, 0], 0, 4] == 1.0
    assert torch.equal(made[table[0, 0], 0, : len(numbers)].cpu(), numbers.to(torch.float8_e4m3fn).view(torch.int8))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(format, strange, device):
    cache = NarrowCache(format, 256, 128)
    *pools, table, past, counts = make_pools(F16, cache, 4, 16, (0,), (1,), device)
    latent = torch.ones(1, 1, 260, dtype=F16, device=device)
    latent[0, 0, 130] = strange
    made = write.write(tuple(pools), latent, table, past, counts, cache)
    read = whole_of(made, cache)[table[0, 0], 0]
    assert read[128:256].isnan().all()
    assert read[:128].isfinite().all()


DECODES = [  # dtype, heads, rank, rope, page, cached, new, tiles of
    (F32, 4, 24, 8, 16, (0, 15, 47), (8, 3, 5), chips.INTERPRETER),
    (F32, 20, 32, 16, 5, (1, 0, 330), (2, 8, 1), 86),
    (F16, 4, 128, 16, 64, (63, 64, 65), (1, 1, 1), 86),
    (BF16, 20, 256, 64, 16, (31, 2), (7, 8), 90),
    (F16, 3, 384, 8, 7, (20, 0, 13), (4, 1, 8), 90),
    (BF16, 20, 32, 16, 32, (300, 31), (3, 8), 86),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "heads", "rank", "rope", "page", "lengths", "new", "sm"), DECODES)
def test_decode_is_that_over_the_numbers(
    dtype, heads, rank, rope, page, lengths, new, sm, format, device, use_tiles, monkeypatch, poison_new_memory
):
    use_tiles(sm, mla_decode, decode, write)
    cache = NarrowCache(format, rank, group_of(rank))
    *pools, table, past, counts = make_pools(dtype, cache, rope, page, lengths, new, device)
    query = torch.randn(len(new), max(new), heads, rank + rope).to(dtype).to(device)
    latent = torch.randn(len(new), max(new), rank + rope).to(dtype).to(device)
    places = table, past, counts
    attended, *present = decode.run(query, latent, *pools, *places, 0.15, rank, format, cache.group)
    assert same([p[1:] for p in present], [p[1:] for p in write.write(tuple(pools), latent, *places, cache)])
    tile = constants.narrow_decode_tile(NAMES[dtype], heads, sm, table.shape[1] * page, page)
    monkeypatch.setattr(mla_decode, "decode_tile", lambda *_: tile)  # so that sums are in the same order
    seen = whole_of(codes.narrowed(latent, rank, format, cache.group), cache)
    expected, _ = mla_decode.run(query, seen, whole_of(pools, cache), *places, 0.15, rank)
    for row, count in enumerate(new):
        assert torch.equal(attended[row, :count], expected[row, :count])
    assert attended.isfinite().all()


PREFILLS = [  # dtype, heads, rank, rope, nope, value, page, cached, new, tiles of
    (F32, 3, 32, 8, 16, 12, 16, (0, 13), (20, 40), 86),
    (F16, 2, 128, 16, 32, 32, 64, (64, 0, 5), (70, 1, 33), 86),
    (BF16, 2, 256, 64, 128, 128, 64, (100, 0), (30, 200), 90),
    (BF16, 3, 24, 8, 16, 8, 7, (20, 0, 3), (9, 17, 1), 90),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "heads", "rank", "rope", "nope", "value", "page", "lengths", "new", "sm"), PREFILLS)
def test_prefill_is_that_over_the_numbers(
    dtype, heads, rank, rope, nope, value, page, lengths, new, sm, format, device, use_tiles, monkeypatch
):
    use_tiles(sm, mla_prefill, prefill, write)
    cache = NarrowCache(format, rank, group_of(rank))
    *pools, table, past, counts = make_pools(dtype, cache, rope, page, lengths, new, device)
    query = torch.randn(len(new), max(new), heads, nope + rope).to(dtype).to(device)
    latent = torch.randn(len(new), max(new), rank + rope).to(dtype).to(device)
    w_uk = (torch.randn(heads, nope, rank) / rank**0.5).to(dtype).to(device)
    w_uv = (torch.randn(heads, value, rank) / rank**0.5).to(dtype).to(device)
    rest = table, past, counts, w_uk, w_uv, 0.15
    attended, *present = prefill.run(query, latent, *pools, *rest, format, cache.group)
    assert same([p[1:] for p in present], [p[1:] for p in write.write(tuple(pools), latent, *rest[:3], cache)])
    tile = constants.narrow_expand_tile(NAMES[dtype], cache, 0, sm)
    assert rank <= tile["BLOCK_K"] or tile == prefill_expand_tile(NAMES[dtype], rank, 0, sm)
    monkeypatch.setattr(mla_prefill, "prefill_expand_tile", lambda *_: tile)
    seen = whole_of(codes.narrowed(latent, rank, format, cache.group), cache)
    expected, _ = mla_prefill.run(query, seen, whole_of(pools, cache), *rest)
    for row, count in enumerate(new):
        assert torch.equal(attended[row, :count], expected[row, :count])
    assert attended.isfinite().all()


def test_a_row_of_padding_reads_no_page(device):
    cache = NarrowCache("int8", 128, 128)
    *pools, table, past, counts = make_pools(F16, cache, 16, 16, (0, 5), (0, 1), device)
    table[0] = 0
    query = torch.randn(2, 1, 4, 144, dtype=F16, device=device)
    attended, *_ = decode.run(query, query[:, :, 0], *pools, table, past, counts, 1.0, 128, "int8", 128)
    assert attended.isfinite().all()


def test_stays_within_memory(device, memory_watch):
    """Lengths and pages out of range, as the builder of TensorRT times plugins with."""
    if device.type == "cuda":
        pytest.skip("the interpreter is what watches memory here")
    cache = NarrowCache("fp8", 128, 128)
    *pools, table, past, counts = make_pools(F16, cache, 16, 16, (0, 5), (3, 2), device)
    past[0], counts[1] = 1 << 30, -5
    query = torch.randn(2, 3, 4, 144, dtype=F16)
    decode.run(query, query[:, :, 0], *pools, table, past, counts, 1.0, 128, "fp8", 128)
    weights = torch.randn(2, 4, 32, 128, dtype=F16)
    prefill.run(query[..., :48], query[:, :, 0], *pools, table, past, counts, *weights, 1.0, "fp8", 128)
