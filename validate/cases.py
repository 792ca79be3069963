"""Scripts: the steps of one comparison, fed alike to every runner.

A case is a ragged batch of four sequences: a right-padded prefill, a second chunk on top of it, then teacher-forced
decode steps. Lengths lie around the page size, so that a page boundary is crossed inside the prefill (row 0), by the
second chunk (row 1) and while decoding (row 2); row 3 starts with one token and has no second chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.session import Int32s, Int64s
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.graph import CacheSpec, GraphName

DECODE_STEPS = 16
ROWS = 4
NO_TARGET = -1


@dataclass(frozen=True)
class Step:
    """One call of a graph. `targets` [B, S] is the token that follows each input token, or NO_TARGET."""

    case: str
    name: str
    graph: GraphName
    input_ids: Int64s  # [B, S]
    sequence_lengths: Int32s  # [B], 0 for a row that takes no part
    past_lengths: Int32s  # [B]
    page_table: Int32s  # [B, M]
    targets: Int64s
    starts_case: bool
    compares_cache: bool

    @property
    def label(self) -> str:
        return f"{self.case}: {self.name}"

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """[B, S], which tokens are real."""
        steps = np.arange(self.input_ids.shape[1])
        live: npt.NDArray[np.bool_] = steps < self.sequence_lengths[:, None]
        return live

    def cached(self) -> list[tuple[Int32s, int]]:
        """Each row's pages and the tokens it holds after this step."""
        totals = self.past_lengths + self.sequence_lengths
        return [(pages, int(total)) for pages, total in zip(self.page_table, totals, strict=True)]


@dataclass(frozen=True)
class Script:
    """All steps, and the pages that they need; page 0 is scratch, the last is poison: listed, but never written."""

    steps: tuple[Step, ...]
    pages: int


def chunk_lengths(page_size: int) -> list[tuple[int, int]]:
    """Tokens of the first and second chunk of each row."""
    near = max(page_size - 9, 2)
    return [(page_size + 5, 7), (max(page_size - 2, 1), 5), (near, 1), (1, 0)]


def tokens_of_case(page_size: int, decode_steps: int = DECODE_STEPS) -> list[int]:
    """Tokens that each row reads, the target of the last step included."""
    return [first + second + decode_steps + 1 for first, second in chunk_lengths(page_size)]


def pages_of_case(cache: CacheSpec, decode_steps: int = DECODE_STEPS) -> int:
    """Scratch, each row's pages, and poison."""
    return 2 + sum(cache.pages_for(tokens) for tokens in tokens_of_case(cache.page_size, decode_steps))


def build_case(
    case: str, tokens: Sequence[Int64s], cache: CacheSpec, seed: int, decode_steps: int = DECODE_STEPS
) -> tuple[Step, ...]:
    """The steps over `tokens`, one array a row, as long as tokens_of_case says; pages are dealt out in seeded order."""
    table = _page_table(cache, seed, decode_steps)
    lengths = np.array(chunk_lengths(cache.page_size), dtype=np.int32)  # [B, 2]
    past = np.zeros(len(tokens), dtype=np.int32)
    steps = []
    plan = [("prefill", lengths[:, 0]), ("chunk", lengths[:, 1])]
    plan += [(f"decode {i}", np.ones(len(tokens), dtype=np.int32)) for i in range(decode_steps)]
    for index, (name, new) in enumerate(plan):
        ids, targets = _windows(tokens, past, new)
        graph: GraphName = "decode" if name.startswith("decode") else "prefill"
        cached = index in (0, 1, len(plan) - 1)
        steps.append(Step(case, name, graph, ids, new, past.copy(), table, targets, index == 0, cached))
        past = past + new
    return tuple(steps)


def seeded_tokens(vocab_size: int, lengths: Sequence[int], seed: int) -> list[Int64s]:
    """Tokens drawn evenly from the vocabulary."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length, dtype=np.int64) for length in lengths]


def text_tokens(ids: Sequence[int], lengths: Sequence[int]) -> list[Int64s]:
    """Rows cut from the text one after the other; RequestError where it is too short for that."""
    if len(ids) < sum(lengths):
        raise RequestError(f"the text has {len(ids)} tokens, {sum(lengths)} are needed: give a longer --text")
    ends = np.cumsum(lengths)
    return [np.array(ids[end - length : end], dtype=np.int64) for end, length in zip(ends, lengths, strict=True)]


def prefill_case(case: str, cache: CacheSpec, vocab_size: int, seed: int) -> tuple[Step, ...]:
    """Both prefill steps of a case over drawn tokens, without decode steps."""
    tokens = seeded_tokens(vocab_size, tokens_of_case(cache.page_size, 0), seed)
    return build_case(case, tokens, cache, seed, decode_steps=0)


def _page_table(cache: CacheSpec, seed: int, decode_steps: int) -> Int32s:
    """Shuffled pages; entries that a row does not need name the poison page."""
    counts = [cache.pages_for(tokens) for tokens in tokens_of_case(cache.page_size, decode_steps)]
    total = pages_of_case(cache, decode_steps)
    order = list(np.random.default_rng(seed).permutation(np.arange(1, total - 1)))
    table = np.full((len(counts), max(counts) + 1), total - 1, dtype=np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [order.pop() for _ in range(count)]
    return table


def _windows(tokens: Sequence[Int64s], past: Int32s, new: Int32s) -> tuple[Int64s, Int64s]:
    """Each row's next `new` tokens, right-padded, and the tokens that follow them."""
    shape = (len(tokens), int(new.max()))
    ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, NO_TARGET, dtype=np.int64)
    for row, (start, count) in enumerate(zip(past, new, strict=True)):
        ids[row, :count] = tokens[row][start : start + count]
        targets[row, :count] = tokens[row][start + 1 : start + count + 1]
    return ids, targets
