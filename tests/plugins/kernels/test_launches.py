"""The host-side arithmetic that the C++ launcher mirrors."""

import itertools

import pytest

from deepseek_trt.plugins.kernels import launches


@pytest.mark.parametrize(
    ("resident", "tiles", "programs"),
    [(264, 1, 264), (132, 2, 66), (1000, 1, 320), (132, 200, 1), (0, 1, 1)],
)
def test_decode_programs(resident, tiles, programs):
    assert launches.decode_programs(resident, tiles) == programs


@pytest.mark.parametrize(
    ("programs", "batch", "parts"),
    [
        (264, 1, 263),  # each sequence may have one piece more than its share
        (264, 66, 198),
        (264, 100, 200),  # two of each, where they are alike
        (264, 200, 200),  # all whole
        (264, 300, 264),
        (1, 1, 1),
    ],
)
def test_decode_parts(programs, batch, parts):
    assert launches.decode_parts(programs, batch) == parts


def test_decode_parts_are_at_most_the_programs():
    """What mla_decode's docstring promises for sizing a workspace."""
    for programs, batch in itertools.product((1, 2, 66, 320), range(1, 400)):
        assert 1 <= launches.decode_parts(programs, batch) <= programs


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
