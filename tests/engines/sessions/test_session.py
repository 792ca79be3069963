"""Every session by the names, dtypes and dims of its graphs, and pools that are written where they are."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.ort_cuda import OrtCudaSession, Place
from deepseek_trt.engines.sessions.session import run_graph, session_graphs
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.errors import RequestError

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
    graphs = session_graphs(bundle, session)
    assert list(graphs) == ["prefill", "decode"]
    for layer in range(session.cache.layers):
        pool = session.pool(layer)
        spec = next(t for t in graphs["decode"].inputs if t.name == f"past_key_values.{layer}.latent")
        assert pool.dtype == spec.dtype == session.cache.dtype
        assert list(pool.shape) == [SIZES.get(dim, dim) for dim in spec.dims]
    out = run_graph(session, graphs["prefill"], feeds_of(graphs["prefill"]))
    feeds = feeds_of(graphs["decode"]) | {"past_lengths": np.array([5, 5], dtype=np.int32)}
    out |= {"next": run_graph(session, graphs["decode"], feeds)["logits"]}
    for logits in out.values():
        assert (logits.dtype, logits.shape) == (np.float32, (2, bundle.manifest.model.vocab_size))
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)  # of values near 1, summed in another order in torch
    assert np.abs(session.pool(0)[[1, 3], :6]).min(axis=-1).max() > 0  # six tokens of both rows
    assert not session.pool(0)[[2, 4]].any()


def test_pools_are_written_in_place(bundle):
    session = OrtSession(bundle, 6)
    pools = [session.pool(layer) for layer in range(session.cache.layers)]
    graph = session_graphs(bundle, session)["prefill"]
    run_graph(session, graph, feeds_of(graph))
    assert all(pool[1].any() and pool is session.pool(layer) for layer, pool in enumerate(pools))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": np.zeros((2, 5), np.int32)}, r"input_ids must be int64 .*, not int32 \(2, 5\)"),
        ({"page_table": np.zeros(2, np.int32)}, r"page_table must be int32 \[.*\], not int32 \(2,\)"),
        ({"more": np.zeros(1)}, "prefill takes input_ids, sequence_lengths, past_lengths, page_table; given: .*more"),
    ],
)
def test_feeds_that_do_not_fit_are_named(bundle, change, words):
    session = OrtSession(bundle, 6)
    graph = session_graphs(bundle, session)["prefill"]
    with pytest.raises(RequestError, match=words):
        run_graph(session, graph, feeds_of(graph) | change)


@pytest.mark.parametrize(("dtype", "by_reference"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_mapped_weights_give_the_same(small_v2, bundle_of, dtype, by_reference):
    """Without ONNX Runtime's own copies of the weights; bfloat16 is computed in float32, so casting is exact."""
    bundle = bundle_of(small_v2.checkpoint, page_size=8, dtype=dtype, by_reference=by_reference)
    copied, mapped = (OrtSession(bundle, 6, 1, mapped=each) for each in (False, True))
    for name, graph in session_graphs(bundle, mapped).items():
        expected, found = (run_graph(session, graph, feeds_of(graph))["logits"] for session in (copied, mapped))
        # float32 sums in another order, as products of packed and unpacked weights are
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
