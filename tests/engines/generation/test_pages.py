"""PagePool: owners, sharing of full pages, and which page is handed out next."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deepseek_trt.engines.generation.batching.limits import SchedulerLimits
from deepseek_trt.engines.generation.pages import PagePool, answer_lengths, page_table, pages_needed, pages_within
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.prefix import PrefixKeys
from deepseek_trt.engines.generation.scheduler import Scheduler
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.errors import RequestError

_SPEC = importlib.util.spec_from_file_location("fake_session", Path(__file__).parents[1] / "fake_session.py")
fake = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake)


def test_scratch_page_is_never_handed_out():
    pool = PagePool(4)
    assert pool.take(3) == [1, 2, 3]
    with pytest.raises(RequestError, match="1 cache pages are needed, 0 are free"):
        pool.take(1)


def test_too_many_takes_none():
    pool = PagePool(4)
    with pytest.raises(RequestError):
        pool.take(4)
    assert pool.free == 3


def test_shared_page_is_free_after_its_last_owner():
    pool = PagePool(3)
    (page,) = pool.take(1)
    pool.name(page, b"a")
    pool.share(pool.find([b"a"]))
    pool.give_back([page])
    assert (pool.free, pool.unowned([page])) == (1, 0)
    pool.give_back([page])
    assert (pool.free, pool.unowned([page])) == (2, 1)
    fake.check_pool(pool, [])


def test_cached_pages_are_reused_last_and_the_end_of_a_prefix_first():
    pool = PagePool(5)
    first = pool.take(2)
    for page, key in zip(first, (b"a", b"b"), strict=True):
        pool.name(page, key)
    pool.give_back(first)
    assert pool.take(2) == [3, 4]
    assert pool.find([b"a", b"b"]) == first
    assert pool.take(1) == [first[1]]
    assert pool.find([b"a", b"b"]) == first[:1]


def test_sharing_renews_a_cached_page():
    pool = PagePool(3)
    for key in (b"a", b"b"):
        (page,) = pool.take(1)
        pool.name(page, key)
        pool.give_back([page])
    pages = pool.find([b"a"])
    pool.share(pages)
    pool.give_back(pages)
    pool.take(1)
    assert pool.find([b"a"]) == pages
    assert pool.find([b"b"]) == []


@pytest.mark.parametrize("act", ["give_back", "share", "name"])
def test_pages_of_nobody_are_refused(act):
    pool = PagePool(3)
    arguments = (2, b"k") if act == "name" else ([2],)
    with pytest.raises(ValueError, match="page 2"):
        getattr(pool, act)(*arguments)


@pytest.mark.parametrize("owned", [[[1]], [[1, 2], [2]], [[1, 2, 0]], []])
def test_check_finds_books_that_disagree(owned):
    pool = PagePool(4)
    pool.take(2)
    fake.check_pool(pool, [[1, 2]])
    with pytest.raises(RuntimeError):
        fake.check_pool(pool, owned)


def test_pages_of_a_run_are_those_that_it_caches():
    cache = CacheSpec(layers=2, page_size=4, latent_dim=8, dtype="bfloat16")
    assert [pages_needed(cache, [length]) for length in (2, 5, 6, 9, 10)] == [2, 2, 3, 3, 4]
    assert pages_needed(cache, [5, 6, 10]) == 1 + 1 + 2 + 3
    assert pages_within(cache, 1) == 2**20 // (2 * 8 * 2 * 4)


@pytest.mark.parametrize("new", [1, 3, 4, 40])
def test_that_many_pages_hold_all_at_once(new):
    prompts = [(3,), (2, 5, 7, 3), (5, 5, 5, 5, 2), (2,) * 37]
    pages = pages_needed(fake.FakeSession.cache, answer_lengths(fake.Config, prompts, new))
    scheduler = Scheduler(fake.FakeSession(pages), fake.Config, SchedulerLimits.for_batch(len(prompts)))
    for prompt in prompts:
        scheduler.add(prompt, SamplingParams(new, ignore_eos=True))
    scheduler.step()
    assert not scheduler._waiting
    while scheduler.busy:
        scheduler.step()
    assert scheduler.counters.preemptions == 0


def test_page_table_is_filled_with_the_scratch_page():
    assert page_table([[3, 1], [2]]).tolist() == [[3, 1], [2, 0]]


def test_prefix_keys_name_all_tokens_up_to_the_end_of_a_page():
    keys = PrefixKeys(2)
    first = keys.of([1, 2, 3, 4, 5], 2)
    assert keys.of([1, 2, 3, 4, 5, 6], 3)[:2] == first
    assert PrefixKeys(2).of([1, 2, 3, 4], 2) == first
    other = PrefixKeys(2).of([9, 2, 3, 4], 2)
    assert not set(other) & set(first)
    with pytest.raises(ValueError, match="1 tokens, not 2"):
        PrefixKeys(2).of([1, 2, 3], 2)


class PoolMachine(RuleBasedStateMachine):
    """Owners come, name their pages, share what others named, and go, in any order."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(9)
        self.owners: list[list[int]] = []

    @rule(count=st.integers(1, 4))
    def take(self, count):
        if count <= self.pool.free:
            self.owners.append(self.pool.take(count))
        else:
            with pytest.raises(RequestError):
                self.pool.take(count)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def name(self, data, key):
        page = data.draw(st.sampled_from([page for pages in self.owners for page in pages]))
        self.pool.name(page, key)

    @rule(keys=st.permutations([b"a", b"b", b"c", b"d", b"e"]))
    def share(self, keys):
        pages = self.pool.find(keys)
        before, cached = self.pool.free, self.pool.unowned(pages)
        if pages:
            self.pool.share(pages)
            self.owners.append(pages)
        assert self.pool.free == before - cached

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def give_back(self, data):
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.pool.give_back(self.owners.pop(index))

    @invariant()
    def books_agree(self):
        fake.check_pool(self.pool, self.owners)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, database=None)
