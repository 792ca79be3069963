"""Every session by the names, dtypes and dims of its graphs, and pools that are written where they are."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.engines.sessions.ort import OrtCudaSession, OrtSession, Place
from deepseek_trt.engines.sessions.torch import TorchSession

SESSIONS = {
    "ort": OrtSession,
    "ort on a device": lambda bundle, pages: OrtCudaSession(bundle, pages, 1, Place("CPUExecutionProvider", "cpu")),
    "torch": TorchSession,
}


@pytest.fixture(scope="module")
def bundle(small_v2, bundle_of):
    return bundle_of(small_v2.checkpoint, page_size=8)


@pytest.fixture(params=SESSIONS)
def session(request, bundle):
    return SESSIONS[request.param](bundle, 6)


SIZES = {"batch_size": 2, "sequence_length": 5, "pages_per_sequence": 2, "pages": 6}
VALUES = {"input_ids": 7, "sequence_lengths": 5, "past_lengths": 0}


def feeds_of(graph):
    """Arrays made of nothing but the spec: two rows of the token 7, on pages of their own."""
    feeds = {}
    for tensor in graph.inputs:
        shape = [SIZES.get(dim, dim) for dim in tensor.dims]
        if tensor.name == "page_table":
            feeds[tensor.name] = np.arange(1, 5, dtype=tensor.dtype).reshape(shape)
        elif not tensor.name.endswith(".latent"):
            feeds[tensor.name] = np.full(shape, VALUES[tensor.name], dtype=tensor.dtype)
    return feeds


def test_runs_by_name(bundle, session):
    prefill, decode = bundle.manifest.graphs
    for layer in range(session.cache.layers):
        pool = session.pool(layer)
        spec = next(t for t in decode.inputs if t.name == f"past_key_values.{layer}.latent")
        assert pool.dtype == session.cache.dtype
        assert list(pool.shape) == [SIZES.get(dim, dim) for dim in spec.dims]
    first = session.prefill(**feeds_of(prefill))
    second = session.decode(**feeds_of(decode) | {"past_lengths": np.array([5, 5], dtype=np.int32)})
    vocab = bundle.manifest.model.vocab_size
    for logits, shape in ((first, (2, vocab)), (second, (2, 5, vocab))):
        assert (logits.dtype, logits.shape) == (np.float32, shape)
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)  # of values near 1, summed in another order in torch
    assert np.abs(session.pool(0)[[1, 3]]).min(axis=-1).max() > 0  # ten tokens of both rows
    assert np.abs(session.pool(0)[[2, 4], :2]).min(axis=-1).max() > 0
    assert not session.pool(0)[[2, 4], 2:].any()


def test_pools_are_written_in_place(bundle):
    session = OrtSession(bundle, 6)
    pools = [session.pool(layer) for layer in range(session.cache.layers)]
    session.prefill(**feeds_of(bundle.graph("prefill")))
    assert all(pool[1].any() and pool is session.pool(layer) for layer, pool in enumerate(pools))


def test_pools_are_filled(session):
    session.fill(3.0)
    assert all((session.pool(layer) == 3.0).all() for layer in range(session.cache.layers))


@pytest.mark.parametrize("kind", SESSIONS)
def test_what_a_session_says_of_itself(bundle, kind):
    """Of what not every session has: the compiled operators read bfloat16 and count experts."""
    session = SESSIONS[kind](bundle, 6)
    compiled = kind == "ort" and session.library is not None
    assert session.weights_dtype == ("bfloat16" if compiled else "float32")
    assert session.threads >= 1
    before = session.experts_hit()
    session.decode(**feeds_of(bundle.graph("decode")))
    assert (session.experts_hit() != before) == compiled
    session.close()


@pytest.mark.parametrize(("dtype", "by_reference"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_mapped_weights_give_the_same(small_v2, bundle_of, dtype, by_reference):
    """Without ONNX Runtime's own copies of the weights; bfloat16 is computed in float32, so casting is exact."""
    bundle = bundle_of(small_v2.checkpoint, page_size=8, dtype=dtype, by_reference=by_reference)
    copied, mapped = (OrtSession(bundle, 6, 1, mapped=each) for each in (False, True))
    for graph in bundle.manifest.graphs:
        expected, found = (getattr(session, graph.name)(**feeds_of(graph)) for session in (copied, mapped))
        # float32 sums in another order, as products of packed and unpacked weights are
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=graph.name)
