"""The bytes of single tokens are together the bytes of the text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from deepseek_trt.engines.text.token_bytes import TokenBytes

TEXTS = ("Return the number of", "Größe – 5 € 🙂\n\tx", "日本語", "\x00\x7f")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_byte_level_tokens(demo_checkpoint, text):
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(TokenBytes(tokenizer).of, ids)) == text.encode()


def test_special_tokens_and_ids_that_there_are_not(demo_checkpoint):
    tokens = TokenBytes(Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json")))
    assert tokens.of(0).decode() == "<｜begin▁of▁sentence｜>"
    assert tokens.of(99999) == b""


def test_tokens_that_are_bytes_in_hexadecimal():
    vocabulary = {"<0xE2>": 0, "▁a": 1, "b": 2}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert [TokenBytes(tokenizer).of(token) for token in range(3)] == [b"\xe2", b" a", b"b"]
