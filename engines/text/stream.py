"""TextStream: one answer's tokens, one after another, as the text that each of them completes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet
_MOST_KEPT = 32  # tokens that wait for their text: twice as many are cut in two


class Part(NamedTuple):
    """Text that a token completes, possibly none; `hidden` for a special token, whose text is written but not shown."""

    text: str
    hidden: bool = False


class TextStream:
    """All parts that are not hidden, and what `flush` gives, are together what the tokenizer decodes of all tokens.

    Special tokens are left out before bytes are put together: a character may begin before one and end after it.
    """

    def __init__(self, tokenizer: Tokenizer, special: Mapping[int, str]) -> None:
        """`special` are the texts of special tokens by id."""
        self._tokenizer, self._special = tokenizer, special
        # Other decoders look at tokens before: they drop the space of the first, or join bytes in their own way.
        self._looks_back = not isinstance(tokenizer.decoder, ByteLevel)
        self._before: list[int] = []  # given already, kept for a decoder that looks back
        self._tokens: list[int] = []  # whose text is not complete
        self._given = 0  # characters of both that were given

    def step(self, token: int) -> Part:
        """The text that this token completes."""
        if token in self._special:
            return Part(self._special[token], hidden=True)
        self._tokens.append(token)
        text = self._decoded([*self._before, *self._tokens])
        new = self._stable(text)[self._given :]
        if new and not text.endswith(_UNFINISHED):
            self._before, self._tokens = self._tokens if self._looks_back else [], []
            self._given = len(self._decoded(self._before)) if self._before else 0
        else:
            self._given += len(new)
            self._shorten()
        return Part(new)

    def flush(self) -> str:
        """What bytes that no more come after are: U+FFFD."""
        text = self._decoded([*self._before, *self._tokens])[self._given :]
        self._before, self._tokens, self._given = [], [], 0
        return text

    def _stable(self, text: str) -> str:
        """What no more tokens can change: byte-level decoders make one U+FFFD of what may become a character."""
        if self._looks_back:
            return text.rstrip(_UNFINISHED)
        return text.removesuffix(_UNFINISHED)

    def _shorten(self) -> None:
        """Let go of the older half of many tokens, where the text is the same in two parts."""
        half = len(self._tokens) // 2
        if self._looks_back or half < _MOST_KEPT:
            return
        first, second = self._decoded(self._tokens[:half]), self._tokens[half:]
        if len(first) <= self._given and first + self._decoded(second) == self._decoded(self._tokens):
            self._tokens, self._given = second, self._given - len(first)

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
