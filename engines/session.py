"""Session: a bundle ready to run, whatever runs it. Sessions own the page pools; callers own the page tables."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.graph import CacheSpec

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Session(Protocol):
    """Prefill and decode over one set of page pools.

    `note` says what a user should know about how it computes (e.g. another dtype than the bundle's), or is empty. A
    session may have a `library`, the file of the compiled CPU operators: whoever samples its logits finds the compiled
    sampler there.
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


def row_latents(session: Session, layer: int, pages: Int32s, length: int) -> npt.NDArray[np.float32]:
    """The cached latents [length, D] of one sequence whose pages are `pages` [M], in float32."""
    pool = session.pool(layer)
    rows = pool[pages].reshape(-1, pool.shape[-1])[:length]
    return np.asarray(rows, dtype=np.float32)
