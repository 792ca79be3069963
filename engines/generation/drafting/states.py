"""States: a request's hidden states that the layer of multi-token prediction has still to take, and what it drafted."""

from __future__ import annotations

import numpy as np

from deepseek_trt.export.arrays import Floats

MOST_DEPTH = 3  # tokens that the layer drafts one after the other; each is worth less than the one before


class States:
    """The layer's cache holds the positions before `filled`; from there on states wait, one a position.

    Whoever gives a request other pages restarts it. `draft` was made when `drafted_at` tokens were cached; `depth` is
    how many tokens to draft next.
    """

    def __init__(self) -> None:
        self.filled = 0
        self.depth = 1
        self.draft: list[int] = []
        self.drafted_at = -1
        self._rows: list[Floats] = []

    def restart(self, cached: int) -> None:
        """The request's pages hold `cached` tokens, and the layer's slots of them, and nothing waits."""
        self.filled, self._rows, self.draft, self.drafted_at = cached, [], [], -1

    def keep(self, at: int, rows: Floats) -> None:
        """States [n, hidden] of the positions from `at` on; what waited for these and later ones is dropped."""
        self._cut(at - self.filled)
        self._rows.append(rows)

    def take(self, count: int) -> Floats:
        """The first `count` [count, hidden] of what waits; they wait on until `fill` says otherwise."""
        return np.concatenate(self._rows)[:count]

    def fill(self, count: int) -> None:
        """The first `count` that waited have slots now."""
        rest = np.concatenate(self._rows)[count:].copy() if self._rows else None
        self._rows = [] if rest is None or not len(rest) else [rest]
        self.filled += count

    def deepen(self, cached: int) -> None:
        """Draft one token more where all of the last draft were picked, else as many as were, and at least one."""
        picked = cached - self.drafted_at - 1
        if self.draft:
            self.depth = min(len(self.draft) + 1, MOST_DEPTH) if picked >= len(self.draft) else max(picked, 1)

    def _cut(self, count: int) -> None:
        """Leave the first `count` waiting."""
        held = sum(map(len, self._rows))
        while held > count:
            last = self._rows.pop()
            held -= len(last)
            if held < count:
                self._rows.append(last[: count - held])
                return
