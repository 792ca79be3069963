"""The compiled CPU operators against the exported bodies, and what they promise beyond."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.session import row_latents
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.manifest import list_added
from deepseek_trt.export.errors import BundleError
from deepseek_trt.plugins.cpu.library import CPU_LIBRARY_FILE, cpu_library

Decoded = list[np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def bundle(small: Any, bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of(small.checkpoint, dtype="float32", page_size=8)


def decode_after_prefill(session: OrtSession, rows: int, tokens: int = 21, steps: int = 3, first: int = 0) -> Decoded:
    """Logits of each step of rows first..first + rows; row r holds tokens + r tokens, the same whatever the others."""
    page, vocab = session.cache.page_size, session.vocab_size
    width = -(-(tokens + 8 + steps) // page)
    table = 1 + np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    rng = [np.random.default_rng(first + r) for r in range(rows)]
    lengths = np.array([tokens + first + r for r in range(rows)], dtype=np.int32)
    ids = np.zeros((rows, lengths.max()), dtype=np.int64)
    for r in range(rows):
        ids[r, : lengths[r]] = rng[r].integers(0, vocab, lengths[r])
        # row by row, so that what is cached does not depend on the others either
        none = np.zeros(1, dtype=np.int32)
        session.prefill(ids[r : r + 1, : lengths[r]], lengths[r : r + 1], none, table[r : r + 1])
    out = []
    for step in range(steps):
        new = np.array([[g.integers(0, vocab)] for g in rng], dtype=np.int64)
        out.append(session.decode(new, np.ones_like(lengths), lengths + step, table)[:, 0])
    return out


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_equals_the_exported_bodies(bundle: Bundle, rows: int) -> None:
    exported = decode_after_prefill(OrtSession(bundle, 64, 1, compiled=False), rows)
    session = OrtSession(bundle, 64, 1)
    assert session.note == ""
    for wanted, got in zip(exported, decode_after_prefill(session, rows), strict=True):
        # Sums of up to some hundred float32 products in another order, through three layers: 1e-5 of the logits' size.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_row_does_not_depend_on_the_batch_or_the_threads(bundle: Bundle) -> None:
    together = decode_after_prefill(OrtSession(bundle, 64, 1), 5)
    alone = decode_after_prefill(OrtSession(bundle, 64, 2), 1, first=3)
    for several, one in zip(together, alone, strict=True):
        np.testing.assert_array_equal(several[3], one[0])


NEW = (8, 1, 5, 3, 8)  # tokens of each row in a call of several
PAST = (21, 0, 1022, 63, 300)  # around the sizes at which a sequence is cut into larger chunks


def decode_rows(session: OrtSession, rows: list[int], calls: list[tuple[int, int]]) -> Decoded:
    """Logits of each row's tokens first..first + count - 1, call by call; what a row lacks is left out."""
    width = -(-(max(PAST) + max(NEW)) // session.cache.page_size)
    table = 1 + np.arange(len(NEW) * width, dtype=np.int32).reshape(len(NEW), width)
    pools = np.random.default_rng(0)
    for layer in range(session.cache.layers):
        session.pool(layer)[:] = pools.standard_normal(session.pool(layer).shape)
    ids = np.random.default_rng(1).integers(0, session.vocab_size, (len(NEW), max(NEW)))
    found: list[list[np.ndarray[Any, Any]]] = [[] for _ in rows]
    for first, count in calls:
        new = np.minimum(np.array(NEW, dtype=np.int32)[rows] - first, count)
        (there,) = np.nonzero(new > 0)
        if not there.size:
            continue
        some = np.array(rows)[there]
        given = ids[some, first : first + new[there].max()]
        past = np.array(PAST, dtype=np.int32)[some] + np.int32(first)
        logits = session.decode(given, new[there], past, table[some])
        for place, row in enumerate(there):
            found[row] += list(logits[place, : new[row]])
            assert not logits[place, new[row] :].any()  # padding
    return [np.stack(row) for row in found]


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def typed_bundle(request: pytest.FixtureRequest, small_v2: Any, bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of(small_v2.checkpoint, dtype=request.param, page_size=8)


ONE_BY_ONE = [(at, 1) for at in range(8)]


@pytest.mark.parametrize("threads", [1, 3])
def test_several_tokens_give_the_bits_of_one_after_the_other(typed_bundle: Bundle, threads: int) -> None:
    session = OrtSession(typed_bundle, 1 + 5 * 129, threads)
    rows = list(range(len(NEW)))
    together = decode_rows(session, rows, [(0, 8)])
    for calls in (ONE_BY_ONE, [(0, 2), (2, 5), (7, 1)]):
        for several, one in zip(together, decode_rows(session, rows, calls), strict=True):
            np.testing.assert_array_equal(several, one)
    for row in rows:
        np.testing.assert_array_equal(decode_rows(session, [row], ONE_BY_ONE)[0], together[row])


LENGTHS = (37, 3, 300, 1, 64)


def prefilled(session: OrtSession, rows: list[int], chunks: list[int]) -> tuple[Decoded, Decoded]:
    """Logits of prompts in chunks that begin at `chunks`, row by row of the last chunk, and what of them is cached."""
    page, vocab = session.cache.page_size, session.vocab_size
    width = -(-max(LENGTHS) // page)
    table = 1 + np.arange(len(LENGTHS) * width, dtype=np.int32).reshape(-1, width)[rows]
    lengths = np.array(LENGTHS, dtype=np.int32)[rows]
    session.fill(np.nan)
    ids = np.random.default_rng(3).integers(0, vocab, (len(LENGTHS), max(LENGTHS)))[rows]
    for first, last in zip(chunks, [*chunks[1:], max(LENGTHS)], strict=True):
        past, new = np.minimum(lengths, first), np.minimum(lengths, last) - np.minimum(lengths, first)
        some = np.flatnonzero(new)
        logits = session.prefill(ids[some, first : first + new.max()], new[some], past[some], table[some])
    layers = range(session.cache.layers)
    cached = [row_latents(session, layer, table[i], lengths[i]) for layer in layers for i in range(len(rows))]
    return list(logits), cached


@pytest.mark.parametrize("chunks", [[0], [0, 20, 290]])
def test_a_prefilled_row_does_not_depend_on_the_batch_or_the_threads(bundle: Bundle, chunks: list[int]) -> None:
    pages = 1 + len(LENGTHS) * -(-max(LENGTHS) // 8)
    several, one = OrtSession(bundle, pages, 2), OrtSession(bundle, pages, 1)
    logits, cached = prefilled(several, [0, 1, 2, 3, 4], chunks)
    for row in (2, 4, 1):
        alone, latents = prefilled(one, [row], [c for c in chunks if c < LENGTHS[row]])
        for layer, latent in enumerate(latents):
            np.testing.assert_array_equal(cached[layer * len(LENGTHS) + row], latent)
        if len(logits) == len(LENGTHS):
            np.testing.assert_array_equal(logits[row], alone[0])
        elif row == 2:
            np.testing.assert_array_equal(logits[0], alone[0])


def test_sessions_that_share_the_threads_do_not_disturb_each_other(bundle: Bundle) -> None:
    """One of two calls at a time has the pool of threads; the other goes on alone."""
    pages = 1 + len(LENGTHS) * -(-max(LENGTHS) // 8)
    sessions = [OrtSession(bundle, pages, 2) for _ in range(2)]
    wanted, _ = prefilled(sessions[0], [2, 0], [0, 256])
    made: list[Decoded] = []

    def run(session: OrtSession) -> None:
        made.extend(prefilled(session, [2, 0], [0, 256])[0] for _ in range(8))

    threads = [threading.Thread(target=run, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 16
    for logits in made:
        np.testing.assert_array_equal(logits, wanted)


def test_the_library_beside_the_bundle_is_taken(bundle: Bundle, tmp_path: Path) -> None:
    built = cpu_library()
    assert built.path is not None
    own = Bundle.open(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))
    shutil.copy(built.path, own.path / CPU_LIBRARY_FILE)
    assert cpu_library(own).path == built.path, "nobody lists it"
    list_added(own.path, [CPU_LIBRARY_FILE])
    own = own.listed_anew()
    taken = cpu_library(own).path
    assert taken != built.path
    assert taken.read_bytes() == built.path.read_bytes()
    (own.path / CPU_LIBRARY_FILE).write_bytes(built.path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"is not the file that manifest\.json lists"):
        cpu_library(own)
