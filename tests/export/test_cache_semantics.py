"""The paged cache as explicit IO: chunks, ragged batches, poisoned pages, and one buffer for past and present."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.session import row_latents
from deepseek_trt.engines.sessions.torch import TorchSession

PAGES = 20
TABLE = np.array([[1, 4, 7, 10, 13], [2, 5, 8, 11, 14], [3, 6, 9, 12, 15]], dtype=np.int32)
# Chunks and batches change the order of float32 sums, each within 2**-24 a rounding; over some hundred roundings in a
# row and values near 1, 1e-5 of the largest value bounds it.
RELATIVE = 1e-5


@pytest.fixture(scope="module", params=["ort", "torch"])
def make_session(request, small, bundle_of):
    bundle = bundle_of(small.checkpoint, dtype="float32", page_size=8)
    kind = {"ort": OrtSession, "torch": TorchSession}[request.param]

    def make():
        session = kind(bundle, PAGES)
        poison(session)
        return session

    return make


def poison(session) -> None:
    """All slots NaN: whoever reads one that was not written shows it."""
    if isinstance(session, TorchSession):
        session._pools = [pool * float("nan") for pool in session._pools]
    else:
        for layer in range(session.cache.layers):
            session.pool(layer)[:] = np.nan


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(7).integers(2, 256, (rows, length))


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    assert np.isfinite(a).all()
    return float(np.abs(a - b).max()) <= RELATIVE * float(np.abs(b).max())


@pytest.mark.parametrize("cuts", [(16,), (1, 2), (8, 16, 24), (5, 29)])
def test_chunked_prefill_equals_one_shot(make_session, cuts):
    ids = tokens(1, 30)
    whole, chunked = make_session(), make_session()
    expected = whole.prefill(ids, int32(30), int32(0), TABLE[:1])
    for start, stop in zip((0, *cuts), (*cuts, 30), strict=True):
        logits = chunked.prefill(ids[:, start:stop], int32(stop - start), int32(start), TABLE[:1])
    assert close(logits, expected)
    for layer in range(whole.cache.layers):
        assert close(row_latents(chunked, layer, TABLE[0], 30), row_latents(whole, layer, TABLE[0], 30))


def test_ragged_batch_equals_single_rows(make_session):
    ids, lengths = tokens(3, 23), int32(23, 1, 12)
    padded = np.where(np.arange(23) < lengths[:, None], ids, 0)
    batch = make_session()
    logits = batch.prefill(padded, lengths, int32(0, 0, 0), TABLE)
    new, again = int32(1, 5, 3), ids[:, :5]
    step = batch.decode(again, new, lengths, TABLE)
    for row in range(3):
        alone = make_session()
        own = TABLE[row : row + 1]
        expected = alone.prefill(ids[row : row + 1, : lengths[row]], lengths[row : row + 1], int32(0), own)
        assert close(logits[row : row + 1], expected)
        for at in range(new[row]):
            token, past = again[row : row + 1, at : at + 1], lengths[row : row + 1] + np.int32(at)
            assert close(step[row, at], alone.decode(token, int32(1), past, own)[0, 0])


def test_unused_pages_and_table_entries_change_nothing(make_session):
    """Pages 16.. hold NaN and the tables' unused entries name them; so does a table that is wider than needed."""
    ids = tokens(1, 9)
    tight, loose = make_session(), make_session()
    expected = tight.prefill(ids, int32(9), int32(0), TABLE[:1, :2])
    wide = np.array([[1, 4, 16, 17, 18, 19]], dtype=np.int32)
    assert close(loose.prefill(ids, int32(9), int32(0), wide), expected)
    expected = tight.decode(ids[:, :3], int32(3), int32(9), TABLE[:1, :2])
    assert close(loose.decode(ids[:, :3], int32(3), int32(9), wide), expected)


def test_padding_is_written_to_page_0_only(make_session):
    session = make_session()
    padded = np.where(np.arange(20) < 3, tokens(1, 20), 0)
    session.prefill(padded, int32(3), int32(0), TABLE[:1])
    session.decode(padded[:, :6], int32(2), int32(3), TABLE[:1])
    for layer in range(session.cache.layers):
        written = np.isfinite(session.pool(layer)).all(axis=-1)  # [P, page]
        assert written[1, :5].all()
        assert written[1:].sum() == 5


def test_empty_row_stays_finite(make_session):
    session = make_session()
    logits = session.prefill(np.zeros((2, 4), np.int64), int32(4, 0), int32(0, 0), TABLE[:2])
    assert np.isfinite(logits).all()


def test_pools_are_updated_in_place(small, bundle_of):
    session = OrtSession(bundle_of(small.checkpoint, dtype="float32", page_size=8), PAGES)
    addresses = [session.pool(layer).ctypes.data for layer in range(session.cache.layers)]
    session.prefill(tokens(1, 9), int32(9), int32(0), TABLE[:1])
    before = session.pool(0)[1].copy()
    session.decode(tokens(1, 1), int32(1), int32(9), TABLE[:1])
    assert [session.pool(layer).ctypes.data for layer in range(session.cache.layers)] == addresses
    assert np.array_equal(session.pool(0)[1], before)
    assert session.pool(0)[4, 1].any()
