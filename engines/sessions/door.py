"""Door: what a session is given is checked before compiled code, which trusts every number, sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.sessions.loading import check_memory
from deepseek_trt.export.arrays import Floats, Int32s, Int64s
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.graph import MOST_NEW_TOKENS, CacheSpec
from deepseek_trt.export.errors import RequestError

_MOST_PAGES = 2**31 - 1  # a page table holds int32
_Bools = npt.NDArray[np.bool_]


@dataclass
class Door:
    """Checks the inputs of prefill and decode. A decode step on pages that the step before had costs a fraction.

    Every number lies where the graphs look things up, each row has room for its tokens, and no row writes a page that
    another one reads or writes. Raises RequestError that names the input, the row and the value.
    """

    pages: int
    page_size: int
    vocab_size: int
    hidden_size: int = 0  # of what drafts
    # What decode had last that had room: page table, and the first and last column that each row writes.
    _decoded: tuple[tuple[int, ...], bytes, list[int], list[int]] | None = None

    @classmethod
    def of(cls, bundle: Bundle, pages: int) -> Door:
        """RequestError where there cannot be so many pages."""
        whole = isinstance(pages, int) and not isinstance(pages, bool)
        if not whole or not 2 <= pages <= _MOST_PAGES:
            raise RequestError(f"pages {pages!r}: must lie between 2, one of which is scratch, and {_MOST_PAGES}")
        model = bundle.manifest.model
        return cls(pages, bundle.manifest.cache.page_size, model.vocab_size, model.hidden_size)

    def check_prefill(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> None:
        """A row of length 0 rests: it writes nothing, and its logits mean nothing. Some row must have a token."""
        self._check_shapes(input_ids, sequence_lengths, past_lengths, page_table)
        steps = input_ids.shape[1]
        longest = int(sequence_lengths.view(np.uint32).max())
        if longest > steps:
            _refuse("sequence_lengths", sequence_lengths, (sequence_lengths < 0) | (sequence_lengths > steps), steps)
        if not longest:
            raise RequestError("sequence_lengths are all 0: give at least one token")
        self._check_numbers(input_ids, past_lengths, page_table, sequence_lengths)

    def check_decode(
        self, input_ids: Int64s, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> None:
        """Every row has a token; what its padding holds is a token id, too."""
        self._check_shapes(input_ids, sequence_lengths, past_lengths, page_table)
        shape, steps = list(input_ids.shape), input_ids.shape[1]
        if steps > MOST_NEW_TOKENS:
            raise RequestError(f"input_ids has shape {shape}: decode takes at most {MOST_NEW_TOKENS} tokens a row")
        ids, new, past = input_ids.ravel().tolist(), sequence_lengths.tolist(), past_lengths.tolist()
        if min(new) < 1 or max(new) > steps:
            _refuse("sequence_lengths", sequence_lengths, (sequence_lengths < 1) | (sequence_lengths > steps), steps, 1)
        page = self.page_size
        written = [p // page for p in past], [(p + n - 1) // page for p, n in zip(past, new, strict=True)]
        known = (page_table.shape, page_table.tobytes(), *written)
        if known != self._decoded or min(ids) < 0 or max(ids) >= self.vocab_size:
            self._check_numbers(input_ids, past_lengths, page_table, sequence_lengths)
            self._decoded = known

    def check_draft(
        self, input_ids: Int64s, hidden: Floats, sequence_lengths: Int32s, past_lengths: Int32s, page_table: Int32s
    ) -> None:
        """As prefill, with a hidden state for every token."""
        self.check_prefill(input_ids, sequence_lengths, past_lengths, page_table)
        wanted = (*input_ids.shape, self.hidden_size)
        if not isinstance(hidden, np.ndarray) or hidden.dtype != np.float32 or hidden.shape != wanted:
            given = f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, np.ndarray) else type(hidden).__name__
            raise RequestError(f"hidden is {given}: give a numpy array of float32 {list(wanted)}")

    def _check_shapes(self, input_ids: Any, sequence_lengths: Any, past_lengths: Any, page_table: Any) -> None:
        _check_array("input_ids", input_ids, np.int64, 2)
        _check_array("past_lengths", past_lengths, np.int32, 1)
        _check_array("page_table", page_table, np.int32, 2)
        rows = len(input_ids)
        if len(past_lengths) != rows or len(page_table) != rows:
            raise RequestError(
                f"input_ids has {rows} rows, past_lengths {len(past_lengths)}, page_table {len(page_table)}: give each "
                "as many"
            )
        _check_array("sequence_lengths", sequence_lengths, np.int32, 1)
        if len(sequence_lengths) != rows:
            raise RequestError(f"input_ids has {rows} rows, sequence_lengths {len(sequence_lengths)}: give as many")

    def _check_numbers(self, input_ids: Int64s, past_lengths: Int32s, page_table: Int32s, new: Int32s) -> None:
        if int(input_ids.view(np.uint64).max()) >= self.vocab_size:
            _refuse("input_ids", input_ids, (input_ids < 0) | (input_ids >= self.vocab_size), self.vocab_size - 1)
        room = page_table.shape[1] * self.page_size
        ends = past_lengths.astype(np.int64)
        lowest = int(ends.min())
        ends += new
        if lowest < 0 or int(ends.max()) > room:
            wrong = (past_lengths < 0) | (ends > room)
            more = int(new[wrong][0])
            why = f" for {more} more in the {page_table.shape[1]} pages of a row"
            _refuse("past_lengths", past_lengths, wrong, room - more, why=why)
        self._check_pages(page_table, past_lengths, ends)

    def _check_pages(self, page_table: Int32s, past_lengths: Int32s, ends: npt.NDArray[np.int64]) -> None:
        """Of the pages that the rows reach; what lies beyond is any page that there is."""
        if int(page_table.view(np.uint32).max()) >= self.pages:
            _refuse("page_table", page_table, (page_table < 0) | (page_table >= self.pages), self.pages - 1)
        columns = np.arange(page_table.shape[1])
        reached = columns < -(-ends // self.page_size)[:, None]
        written = reached & (columns >= (past_lengths // self.page_size)[:, None])
        pages, own = np.sort(page_table[reached]), page_table[written]
        if pages[0] == 0:
            _refuse("page_table", page_table, reached & (page_table == 0), self.pages - 1, 1)
        if (pages.searchsorted(own, "right") - pages.searchsorted(own) != 1).any():
            self._refuse_shared(page_table, reached, written)

    def _refuse_shared(self, page_table: Int32s, reached: _Bools, written: _Bools) -> None:
        found, counts = np.unique(page_table[reached], return_counts=True)
        shared = np.intersect1d(found[counts > 1], page_table[written])[0]
        rows = np.nonzero(reached & (page_table == shared))[0].tolist()
        raise RequestError(f"page_table: page {shared} is written and stands there {len(rows)} times (rows {rows[:8]})")


def check_cache_memory(cache: CacheSpec, pages: int) -> None:
    """BackendError where this machine's memory does not hold so many pages in the cache's dtype."""
    check_memory(
        cache.bytes_per_token * cache.page_size * pages, f"a latent cache of {pages:,} pages takes", "give fewer pages"
    )


def _check_array(name: str, array: Any, dtype: type[np.generic], dims: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        given = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise RequestError(f"{name} is {given}: give a numpy array of {dtype.__name__}")
    if array.ndim != dims or not array.size:
        wanted = "[B]" if dims == 1 else "[B, at least 1]"
        raise RequestError(f"{name} has shape {list(array.shape)}: give {wanted}, with at least one row")


def _refuse(name: str, array: npt.NDArray[Any], wrong: _Bools, most: int, least: int = 0, why: str = "") -> None:
    place = tuple(int(index) for index in np.argwhere(wrong)[0])
    raise RequestError(f"{name}{list(place)} is {array[place]}: must lie between {least} and {most}{why}")
