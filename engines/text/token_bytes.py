"""The bytes that single tokens stand for: a token may hold part of a character."""

from __future__ import annotations

import functools
import re

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """By the tokenizer's way of writing bytes: byte-level letters, <0x0A>, or what it decodes of the token alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, ByteLevel)
        self._added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}

    def of(self, token: int) -> bytes:
        """Special tokens are their text; an id that the tokenizer does not know is nothing."""
        if token in self._added:
            return self._added[token].encode()
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        letters = _byte_letters()
        if self._byte_level and all(letter in letters for letter in written):
            return bytes(letters[letter] for letter in written)
        byte = _BYTE.fullmatch(written)
        if byte:
            return bytes([int(byte[1], 16)])
        return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()


@functools.lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
