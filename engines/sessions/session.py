"""Session: a bundle ready to run, whatever runs it. Sessions own the page pools; callers own the page tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import CacheSpec, GraphSpec, TensorSpec
from deepseek_trt.export.errors import RequestError


class Session(Protocol):
    """Prefill and decode over one set of page pools, which are bound as past and present at once.

    `note` says what a user should know about how it computes (e.g. another dtype than the bundle's), or is empty. A
    session may have a `library`, the file of the compiled CPU operators, and the `threads` that they run on: whoever
    samples its logits finds the compiled sampler there. Where the experts that decode steps read are counted, it has
    `experts_hit`, which gives the ExpertsHit of all steps so far.
    """

    backend: str
    note: str
    cache: CacheSpec
    pages: int

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        """Cache the tokens input_ids [B, S], right-padded, after past_lengths [B]; float32 logits [B, vocab]."""

    def decode(self, input_ids: Int64s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        """Cache one token a row, input_ids [B, 1], at position past_lengths [B]; float32 logits [B, vocab]."""

    def pool(self, layer: int) -> npt.NDArray[Any]:
        """The layer's page pool [P, page, D] as it is now; a view where it can be one."""


def session_graphs(bundle: Bundle, session: Session) -> dict[str, GraphSpec]:
    """The graphs' inputs and outputs by graph, the pools in the dtype that the session computes in."""

    def own(tensor: TensorSpec) -> TensorSpec:
        is_pool = tensor.name.endswith(".latent")
        return dataclasses.replace(tensor, dtype=session.cache.dtype) if is_pool else tensor

    return {
        graph.name: GraphSpec(graph.name, tuple(map(own, graph.inputs)), tuple(map(own, graph.outputs)))
        for graph in bundle.manifest.graphs
    }


def run_graph(session: Session, graph: GraphSpec, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Run prefill or decode by the names of `graph`: what it takes beside the pools in, its logits out.

    Raises RequestError naming an input that is missing, unknown, or of another dtype or rank.
    """
    wanted = {tensor.name: tensor for tensor in graph.inputs if not tensor.name.endswith(".latent")}
    if wanted.keys() != feeds.keys():
        raise RequestError(f"{graph.name} takes {', '.join(wanted)}; given: {', '.join(feeds)}")
    for name, tensor in wanted.items():
        array = feeds[name]
        if array.dtype != tensor.dtype or array.ndim != len(tensor.dims):
            raise RequestError(f"{name} must be {tensor.dtype} {list(tensor.dims)}, not {array.dtype} {array.shape}")
    run = session.prefill if graph.name == "prefill" else session.decode
    return {"logits": run(**feeds)}


def row_latents(session: Session, layer: int, pages: Int32s, length: int) -> npt.NDArray[np.float32]:
    """The cached latents [length, D] of one sequence whose pages are `pages` [M], in float32."""
    pool = session.pool(layer)
    rows = pool[pages].reshape(-1, pool.shape[-1])[:length]
    return np.asarray(rows, dtype=np.float32)
