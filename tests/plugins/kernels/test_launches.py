"""The host-side arithmetic that the C++ launcher mirrors."""

import itertools

import pytest

from deepseek_trt.plugins.kernels import launches


@pytest.mark.parametrize(
    ("batch", "head_tiles", "capacity", "block_n", "splits"),
    [
        (1, 1, 163840, 32, 128),  # no more than the combine can hold
        (1, 1, 4096, 32, 32),  # no more than there are pieces of four tiles
        (1, 1, 64, 32, 1),
        (4, 8, 163840, 32, 8),  # as many as fill the chip
        (300, 1, 163840, 32, 1),
    ],
)
def test_decode_splits(batch, head_tiles, capacity, block_n, splits):
    assert launches.decode_splits(batch, head_tiles, capacity, block_n) == splits


def test_decode_workspace_bound():
    """What mla_decode's docstring promises for sizing a workspace."""
    for batch, tiles in itertools.product(range(1, 300), (1, 2, 8)):
        slots = batch * launches.decode_splits(batch, tiles, 163840, 32)
        assert slots <= min(launches.cdiv(256, tiles) + batch, 128 * batch)


def test_prefill_workspace_bound():
    for batch, capacity, heads in itertools.product((1, 8), (64, 4096, 163840), (16, 128)):
        chunk = launches.prefill_chunk_heads(batch, capacity, heads, 512)
        assert 1 <= chunk <= heads
        assert chunk * batch * capacity * 512 <= max(2**30, batch * capacity * 512)


@pytest.mark.parametrize(("heads", "chunk"), [(16, 16), (16, 5), (1, 1), (7, 8)])
def test_head_chunks_cover_all_heads_once(heads, chunk):
    covered = [part.first + i for part in launches.head_chunks(heads, chunk) for i in range(part.count)]
    assert covered == [*range(heads)]


@pytest.mark.parametrize(("experts", "block"), [(4, 16), (64, 16), (160, 128)])
def test_dispatch_blocks_suffice_and_are_reached(experts, block):
    for slots in (1, 3, experts, 6 * experts, 1000):
        most = launches.dispatch_blocks(slots, experts, block)
        # the worst case: as many experts as can have one slot have one beyond whole blocks
        ragged = min(experts, slots)
        rest = (slots - ragged) // block * block
        assert most >= ragged + rest // block
        assert most * block >= slots


def test_dot_size():
    assert [launches.dot_size(n) for n in (1, 16, 17, 192, 512)] == [16, 16, 32, 256, 512]
