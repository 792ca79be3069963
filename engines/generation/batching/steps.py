"""What a scheduler's step has the session compute: rows of tokens in, logits of each row out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_trt.engines.generation.batching.decode_rows import DecodeRows
from deepseek_trt.engines.generation.drafting.drafter import Drafter
from deepseek_trt.engines.generation.pages import page_table
from deepseek_trt.engines.generation.request import Work
from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.arrays import Floats, Int32s


class Steps:
    """Calls of one session. Logits are numbers, or places in the session's own memory where it is `holding` them."""

    def __init__(self, session: Session, vocab: int, drafter: Drafter | None) -> None:
        self.holding = session.holding()
        self._session, self._vocab, self._drafter = session, vocab, drafter

    def prefill(self, work: list[Work]) -> Sequence[Floats] | Floats | Int32s:
        """Logits [vocab], or their place, at the end of each row's chunk."""
        if not work:
            return ()
        ids = np.zeros((len(work), max(w.new for w in work)), dtype=np.int64)
        for row, w in enumerate(work):
            ids[row, : w.new] = w.request.tokens[w.request.cached : w.request.cached + w.new]
        prefill = self.holding.prefill_held if self.holding else self._session.prefill
        logits = prefill(ids, _int32([w.new for w in work]), *self._cached(work))
        if self._drafter is not None:
            self._drafter.keep(work)
        if logits.ndim == 3:  # exported with all logits
            return [logits[row, w.new - 1] for row, w in enumerate(work)]
        return logits

    def decode(self, work: list[Work]) -> Floats | Int32s:
        """Logits [B, S, vocab], or places [B, S], after each row's last token and its drafts."""
        if not work:
            return np.empty((0, 1, self._vocab), dtype=np.float32)
        longest = max(w.new for w in work)
        ids = [[w.request.tokens[-1], *w.draft, *[0] * (longest - w.new)] for w in work]
        decode = self.holding.decode_held if self.holding else self._session.decode
        logits = decode(np.array(ids, dtype=np.int64), _int32([w.new for w in work]), *self._cached(work))
        if self._drafter is not None:
            self._drafter.keep(work)
        return logits

    def decode_rows(self, rows: DecodeRows) -> Any:
        """Logits [B, vocab], or places [B], of rows that were put together before, a token each."""
        decode = self.holding.decode_held if self.holding else self._session.decode
        return np.ascontiguousarray(decode(rows.ids, rows.new, rows.past, rows.table)[:, 0])

    def _cached(self, work: list[Work]) -> tuple[Int32s, Int32s]:
        """past_lengths [B] and page_table [B, M] of the pages that this step reaches: prefill expands all it gets."""
        reached = [self._session.cache.pages_for(w.request.cached + w.new) for w in work]
        tables = [w.request.pages[:count] for w, count in zip(work, reached, strict=True)]
        return _int32([w.request.cached for w in work]), page_table(tables)


def _int32(values: list[int]) -> Int32s:
    return np.array(values, dtype=np.int32)
