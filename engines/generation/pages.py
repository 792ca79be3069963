"""Pages of the latent cache: how many a run needs, which belong to whom, and which full ones may be used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from deepseek_trt.export.arrays import Int32s
from deepseek_trt.export.bundle.graph import CacheSpec
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.export.errors import RequestError

SCRATCH_PAGE = 0
MIB = 2**20


def sequence_pages(cache: CacheSpec, tokens: int) -> int:
    """Pages of one sequence of `tokens` tokens, prompt and answer: the last one is never cached."""
    return cache.pages_for(tokens - 1)


def pages_needed(cache: CacheSpec, lengths: Iterable[int]) -> int:
    """Pages that hold sequences of these lengths, prompt and answer, at once; the scratch page counts."""
    return 1 + sum(sequence_pages(cache, length) for length in lengths)


def pages_within(cache: CacheSpec, mib: int) -> int:
    """Pages that `mib` MiB hold in the bundle's dtype."""
    return mib * MIB // (cache.bytes_per_token * cache.page_size)


def answer_lengths(config: ModelConfig, prompts: Iterable[Sequence[int]], max_new_tokens: int) -> list[int]:
    """The most tokens that each prompt and its answer can have together."""
    return [min(len(prompt) + max_new_tokens, config.max_position_embeddings) for prompt in prompts]


class PagePool:
    """Hands out pages 1..pages-1; page 0 is scratch and never handed out.

    Every page is in one of three states: owned (by one request, or by several when it is full and shared), cached
    (owned by nobody, its contents still named by a key) or blank. Cached pages count as free: the one that was given
    back longest ago is handed out when no blank page is left.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._blank = list(range(pages - 1, SCRATCH_PAGE, -1))  # the lowest is handed out first
        self._owners: dict[int, int] = {}  # page -> how many own it
        self._cached: OrderedDict[int, None] = OrderedDict()  # the first was given back longest ago
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._blank) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """`count` pages for one owner; RequestError, and nothing taken, when there are not so many."""
        if count > self.free:
            raise RequestError(f"{count} cache pages are needed, {self.free} are free: use fewer or shorter prompts")
        taken = [self._take_one() for _ in range(count)]
        self._owners.update(dict.fromkeys(taken, 1))
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Let one owner go of `pages`, in the order of its table; the last page of a prefix is the first to be reused.

        Raises ValueError for a page that nobody owns.
        """
        for page in reversed(pages):
            if page not in self._owners:
                raise ValueError(f"page {page} is given back but nobody owns it")
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._release(page)

    def name(self, page: int, key: bytes) -> None:
        """Make an owned, full page findable by what it holds; of two pages with one key the first stays."""
        if page not in self._owners:
            raise ValueError(f"page {page} is named but nobody owns it")
        if page not in self._key_of and key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def forget(self, pages: Sequence[int]) -> None:
        """Make pages that one owner has to itself unfindable: they hold nothing to be used again."""
        for page in pages:
            if self._owners[page] == 1 and page in self._key_of:
                del self._page_of[self._key_of.pop(page)]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of known keys, from the first on."""
        found: list[int] = []
        for key in keys:
            if key not in self._page_of:
                break
            found.append(self._page_of[key])
        return found

    def unowned(self, pages: Iterable[int]) -> int:
        """How many of `pages` are cached: sharing them takes them off `free`."""
        return sum(page in self._cached for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Make one more owner of `pages`, which `find` gave."""
        for page in pages:
            if page not in self._key_of:
                raise ValueError(f"page {page} is shared but has no key")
            self._cached.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1

    def _take_one(self) -> int:
        if self._blank:
            return self._blank.pop()
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def _release(self, page: int) -> None:
        if page in self._key_of:
            self._cached[page] = None
        else:
            self._blank.append(page)


def page_table(owned: Sequence[Sequence[int]]) -> Int32s:
    """The rows' pages as one int32 [B, M]; rows with fewer pages are filled with the scratch page."""
    width = max(map(len, owned))
    padding = [SCRATCH_PAGE] * width
    return np.array([[*pages, *padding[len(pages) :]] for pages in owned], dtype=np.int32)
