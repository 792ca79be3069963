"""Scripts: the steps of one comparison, fed alike to every runner.

A case is a ragged batch of four sequences: a right-padded prefill, a second chunk on top of it, then teacher-forced
decode steps, of one token a row and then of several. Lengths lie around the page size, so that a page boundary is
crossed inside the prefill (row 0), by the second chunk (row 1) and while decoding (row 2); row 3 starts with one token
and has no second chunk. Longer cases are made by long_cases.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Int32s, Int64s
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.numbers.loss import IGNORED
from deepseek_trt.validate.steps import Slots, Step

DECODE_STEPS = 16
SEVERAL = ((1, 7, 5, 2), (2, 3, 8, 4))  # tokens of each row in the decode steps of several
ROWS = 4


@dataclass(frozen=True)
class Plan:
    """Tokens that each row of a case takes in its one or two prefills, the decode steps of one token a row after them,
    and what each row takes in decode steps of several.
    """

    prefills: tuple[tuple[int, ...], ...]
    decode_steps: int
    several: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> list[int]:
        """Tokens that each row reads, the target of the last step included."""
        given = zip(*self.prefills, *self.several, strict=True)
        return [sum(row) + self.decode_steps + 1 for row in given]

    def pages(self, cache: CacheSpec) -> int:
        """Scratch, each row's pages, and poison."""
        return 2 + sum(cache.pages_for(tokens) for tokens in self.tokens)


def case_plan(page_size: int, decode_steps: int = DECODE_STEPS) -> Plan:
    """The plan of a case."""
    near = max(page_size - 9, 2)
    prefills = ((page_size + 5, max(page_size - 2, 1), near, 1), (7, 5, 1, 0))
    return Plan(prefills, decode_steps, SEVERAL if decode_steps else ())


def build_case(
    case: str, tokens: Sequence[Int64s], plan: Plan, cache: CacheSpec, seed: int, is_watched: bool = True
) -> tuple[Step, ...]:
    """The steps over `tokens`, one array a row, as long as the plan says; pages are dealt out in seeded order.

    A token that is IGNORED is fed as 0, and no target.
    """
    table = _page_table(plan, cache, seed)
    past: Int32s = np.zeros(len(tokens), dtype=np.int32)
    ones = np.ones(len(tokens), dtype=np.int32)
    prefills = zip(("prefill", "chunk"), plan.prefills, strict=False)
    calls = [(name, np.array(row, dtype=np.int32)) for name, row in prefills]
    calls += [(f"decode {i}", ones) for i in range(plan.decode_steps)]
    calls += [(f"decode of up to {max(row)}", np.array(row, dtype=np.int32)) for row in plan.several]
    steps = []
    for index, (name, new) in enumerate(calls):
        ids, targets = _windows(tokens, past, new)
        is_prefill, ends = index < len(plan.prefills), past + new
        step = Step(
            case=case,
            name=name,
            graph="prefill" if is_prefill else "decode",
            feeds={"input_ids": ids, "sequence_lengths": new, "past_lengths": past, "page_table": table},
            live=np.arange(ids.shape[1]) < new[:, None],
            past_lengths=past,
            starts_case=index == 0,
            slots=used_slots(table, ends, cache) if is_prefill or index == len(calls) - 1 else None,
            targets=targets,
            is_watched=is_watched,
        )
        steps.append(step)
        past = ends
    return tuple(steps)


def used_slots(page_table: Int32s, totals: Int32s, cache: CacheSpec) -> Slots:
    """The slots of rows that hold `totals` tokens [B] in the pages of page_table [B, M]."""
    owners = [(row, t) for row, total in enumerate(totals.tolist()) for t in range(total)]
    rows, positions = (np.array(places, dtype=np.int64) for places in zip(*owners, strict=True))
    return Slots((page_table[rows, positions // cache.page_size], positions % cache.page_size), owners)


def seeded_tokens(vocab_size: int, lengths: Sequence[int], seed: int) -> list[Int64s]:
    """Tokens drawn evenly from the vocabulary."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length, dtype=np.int64) for length in lengths]


def text_tokens(ids: Sequence[int], lengths: Sequence[int]) -> list[Int64s]:
    """Rows cut from the text one after the other; RequestError where it is too short for that."""
    if len(ids) < sum(lengths):
        raise RequestError(f"the text has {len(ids)} tokens, {sum(lengths)} are needed: give a longer --text")
    ends = itertools.accumulate(lengths)
    return [np.array(ids[end - length : end], dtype=np.int64) for end, length in zip(ends, lengths, strict=True)]


def prefill_case(case: str, cache: CacheSpec, vocab_size: int, seed: int) -> tuple[Step, ...]:
    """Both prefill steps of a case over drawn tokens, without decode steps."""
    plan = case_plan(cache.page_size, 0)
    return build_case(case, seeded_tokens(vocab_size, plan.tokens, seed), plan, cache, seed)


def _page_table(plan: Plan, cache: CacheSpec, seed: int) -> Int32s:
    """Shuffled pages; entries that a row does not need name the poison page."""
    counts = [cache.pages_for(tokens) for tokens in plan.tokens]
    total = plan.pages(cache)
    order = list(np.random.default_rng(seed).permutation(np.arange(1, total - 1)))
    table = np.full((len(counts), max(counts) + 1), total - 1, dtype=np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [order.pop() for _ in range(count)]
    return table


def _windows(tokens: Sequence[Int64s], past: Int32s, new: Int32s) -> tuple[Int64s, Int64s]:
    """Each row's next `new` tokens, right-padded, and the tokens that follow them."""
    shape = (len(tokens), int(new.max()))
    ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for row, (start, count) in enumerate(zip(past, new, strict=True)):
        ids[row, :count] = np.maximum(tokens[row][start : start + count], 0)
        targets[row, :count] = tokens[row][start + 1 : start + count + 1]
    return ids, targets
