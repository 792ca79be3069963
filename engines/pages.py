"""PagePool: which pages of the latent cache belong to whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_trt.engines.session import Int32s
from deepseek_trt.export.errors import RequestError

SCRATCH_PAGE = 0


class PagePool:
    """Hands out pages 1..pages-1; page 0 is scratch and never handed out."""

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, SCRATCH_PAGE, -1))  # the lowest is handed out first

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages for one owner; RequestError when there are not so many."""
        if count > self.free:
            raise RequestError(f"{count} cache pages are needed, {self.free} are free: use fewer or shorter prompts")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


def page_table(owned: Sequence[Sequence[int]]) -> Int32s:
    """The rows' pages as one int32 [B, M]; rows with fewer pages are filled with the scratch page."""
    width = max(len(pages) for pages in owned)
    table = np.full((len(owned), width), SCRATCH_PAGE, dtype=np.int32)
    for row, pages in enumerate(owned):
        table[row, : len(pages)] = pages
    return table
