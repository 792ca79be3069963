"""Session: a bundle ready to run, whatever runs it. Sessions own the page pools; callers own the page tables."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from deepseek_trt.engines.sessions.door import Door
from deepseek_trt.engines.sessions.holding import Holding
from deepseek_trt.engines.sessions.pools import fill_pools, numbers_of
from deepseek_trt.export.arrays import Array, Arrays, Floats, Int32s, Int64s
from deepseek_trt.export.bundle.graph import PREVIOUS_HIDDEN, CacheSpec
from deepseek_trt.export.dtypes import computed_in
from deepseek_trt.export.errors import BackendError
from deepseek_trt.plugins.cpu.library import ExpertsHit

CHUNK = 512  # tokens of a prompt that a step takes best on a CPU


class Session(Protocol):
    """Prefill and decode over one set of page pools, which are bound as past and present at once.

    Sessions have it as their base, which gives what most of them have in common. `note` says what a user should know
    about how it computes (e.g. another dtype than the bundle's), or is empty. `library` is the file of the compiled CPU
    operators, where whoever samples the logits finds the compiled sampler, and `threads` those that they run on.
    `chunk` is how many tokens of one prompt a step takes best. `rounds_tokens` says that products with int8 or int4
    take tokens as 16-bit integers, 32 of them by their largest. `drafts` says whether there is `draft`; then `hidden`
    holds the states of the last call of any of the three, float32 [B, S, hidden], of padding meaningless, and of draft
    [B, hidden].
    """

    backend: str
    note: str
    cache: CacheSpec
    pages: int
    library: Path | None = None
    threads: int = 1
    chunk: int = CHUNK
    rounds_tokens: bool = False
    drafts: bool = False
    hidden: Floats = np.zeros((0, 0, 0), dtype=np.float32)

    @property
    def weights_dtype(self) -> str:
        """What decode reads weights as."""
        return self.cache.dtype

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        """Cache the tokens input_ids [B, S], right-padded, after past_lengths [B]; float32 logits [B, vocab].

        RequestError for numbers that no graph may see: door.py says which. So does decode.
        """

    def decode(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        """As prefill, at most MOST_NEW_TOKENS a row and at least one; float32 logits [B, S, vocab], one a token.

        Where rows are shorter than S, logits of padding are finite and mean nothing.
        """

    def draft(
        self, input_ids: Int64s, hidden: Floats, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> Floats:
        """By the layer of multi-token prediction, whose cache is the last pool: the logits [B, vocab] of what follows
        each row's last of input_ids [B, S], right-padded.

        hidden [B, S, hidden] are the states at the positions before them, past_lengths of which were given before. A
        row of length 0 rests, as in prefill.
        """
        raise BackendError(f"{self.backend} drafts nothing: the bundle was exported without --mtp")

    def holding(self) -> Holding | None:
        """How to have logits left where they are computed, and tokens picked there; None where that is this process."""
        return None

    def pool(self, layer: int) -> Array:
        """The layer's page pool [P, page, D] as it is now; a view where it can be one.

        Of a narrow cache, a copy of the numbers that it stands for.
        """
        return numbers_of(self.cache, self.pools(layer))

    def pools(self, layer: int) -> tuple[Array, ...]:
        """The layer's pools as they are stored, in the cache's order; views where they can be."""
        return (self.pool(layer),)

    def fill(self, value: float) -> None:
        """Set every number of every pool."""
        for layer in range(self.cache.layers):
            fill_pools(self.pools(layer), value)

    def experts_hit(self) -> ExpertsHit:
        """What all decode steps so far have read of routed experts; zeros where that is not counted."""
        return ExpertsHit(0, 0)

    def close(self) -> None:
        """Give back what it holds beside this process's memory; happens by itself when the session goes."""
        return None


class GraphPair(Session):
    """A session whose graphs both run in one way, `compute`, on what the door lets in."""

    door: Door

    def prefill(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        self.door.check_prefill(input_ids, sequence_lengths, past_lengths, page_table)
        return self.compute("prefill", feeds_of(input_ids, sequence_lengths, past_lengths, page_table))

    def decode(self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Floats:
        self.door.check_decode(input_ids, sequence_lengths, past_lengths, page_table)
        return self.compute("decode", feeds_of(input_ids, sequence_lengths, past_lengths, page_table))

    def draft(
        self, input_ids: Int64s, hidden: Floats, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> Floats:
        self.door.check_draft(input_ids, hidden, sequence_lengths, past_lengths, page_table)
        feeds = feeds_of(input_ids, sequence_lengths, past_lengths, page_table)
        return self.compute("mtp", {"input_ids": feeds.pop("input_ids"), PREVIOUS_HIDDEN: hidden, **feeds})

    def compute(self, graph: str, feeds: Arrays) -> Floats:
        """Run a graph of the bundle on its inputs by name, in its order; where it gives hidden states, keep them."""
        raise NotImplementedError


def feeds_of(input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s) -> Arrays:
    """The inputs of either graph by name, in its order."""
    return {
        "input_ids": input_ids,
        "sequence_lengths": sequence_lengths,
        "past_lengths": past_lengths,
        "page_table": page_table,
    }


def row_latents(session: Session, layer: int, pages: Int32s, length: int) -> Floats:
    """The cached latents [length, D] of one sequence whose pages are `pages` [M], in float32."""
    pool = session.pool(layer)
    rows = pool[pages].reshape(-1, pool.shape[-1])[:length]
    return np.asarray(rows, dtype=np.float32)


def widening_note(dtype: str) -> str:
    """The note of a bundle in `dtype` where ONNX Runtime's CPU provider computes in a wider one; else empty."""
    wider = computed_in(dtype)
    return f"{dtype} weights, computed in {wider} (ONNX Runtime's CPU provider)" if wider != dtype else ""
