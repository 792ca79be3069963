"""Scripts: ragged, page-crossing, and honest about which slots and tokens count."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.errors import RequestError
from deepseek_trt.validate.cases.cases import (
    DECODE_STEPS,
    SEVERAL,
    build_case,
    case_plan,
    seeded_tokens,
    text_tokens,
)
from deepseek_trt.validate.numbers.loss import IGNORED

CACHE = CacheSpec(layers=2, page_size=8, latent_dim=4, dtype="float32")
PLAN = case_plan(8)


@pytest.fixture(scope="module")
def steps():
    return build_case("seeded", seeded_tokens(100, PLAN.tokens, 0), PLAN, CACHE, seed=0)


def test_a_prefill_a_chunk_then_decode_steps(steps):
    assert [s.graph for s in steps] == ["prefill"] * 2 + ["decode"] * (DECODE_STEPS + len(SEVERAL))
    assert [s.starts_case for s in steps] == [True] + [False] * (len(steps) - 1)
    assert steps[0].sequence_lengths.tolist() == [13, 6, 2, 1]  # ragged, around the page size of 8
    assert steps[1].sequence_lengths.tolist() == [7, 5, 1, 0]  # the last row takes no part
    assert [tuple(s.sequence_lengths) for s in steps[-len(SEVERAL) :]] == list(SEVERAL)
    assert len({s.label for s in steps}) == len(steps)
    for before, after in pairwise(steps):
        assert (after.past_lengths == before.past_lengths + before.sequence_lengths).all()


def test_page_boundaries_are_crossed_in_every_phase(steps):
    def crosses(step, row):
        first, last = step.past_lengths[row], step.past_lengths[row] + step.sequence_lengths[row] - 1
        return first // 8 < last // 8

    assert crosses(steps[0], 0)
    assert crosses(steps[1], 1)
    assert steps[2].past_lengths[2] < 8 <= steps[-1].past_lengths[2]


def test_pages_are_shared_by_nobody_and_poison_is_never_written(steps):
    table, poison = steps[0].page_table, PLAN.pages(CACHE) - 1
    used = [table[row, : -(-tokens // 8)] for row, tokens in enumerate(PLAN.tokens)]
    pages = np.concatenate(used)
    assert len(set(pages.tolist())) == len(pages)
    assert 0 not in pages
    assert poison not in pages
    assert (table[3, len(used[3]) :] == poison).all()


def test_targets_are_the_tokens_that_follow(steps):
    first, second = steps[0], steps[1]
    assert (first.targets[0, :12] == first.input_ids[0, 1:13]).all()
    assert first.targets[0, 12] == second.input_ids[0, 0]
    assert (first.targets[~first.live] == IGNORED).all()


def test_the_same_seed_gives_the_same_script(steps):
    again = build_case("seeded", seeded_tokens(100, PLAN.tokens, 0), PLAN, CACHE, seed=0)
    for ours, theirs in zip(steps, again, strict=True):
        assert (ours.input_ids == theirs.input_ids).all()
        assert (ours.page_table == theirs.page_table).all()


def test_a_short_text_is_refused():
    with pytest.raises(RequestError, match="3 tokens, 12 are needed"):
        text_tokens([1, 2, 3], [5, 7])
