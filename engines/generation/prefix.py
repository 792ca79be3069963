"""PrefixKeys: names of full cache pages by all tokens up to their end, so that equal prefixes share pages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class PrefixKeys:
    """The keys of one sequence's full pages, made as the sequence grows; tokens that had a key must not change.

    Key i hashes key i-1 and the tokens of page i: equal keys mean equal tokens from the first on, as a page's latents
    depend on all tokens before them.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._keys: list[bytes] = []

    def of(self, tokens: Sequence[int], pages: int) -> list[bytes]:
        """The keys of the first `pages` pages of `tokens`, which must fill them."""
        while len(self._keys) < pages:
            start = len(self._keys) * self._page_size
            block = np.asarray(tokens[start : start + self._page_size], dtype="<i8")
            if len(block) < self._page_size:
                raise ValueError(f"page {len(self._keys)} holds {len(block)} tokens, not {self._page_size}: no key")
            before = self._keys[-1] if self._keys else b""
            self._keys.append(hashlib.blake2b(before + block.tobytes(), digest_size=16).digest())
        return self._keys[:pages]
