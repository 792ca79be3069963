"""A DeepSeek-V2 checkpoint that recites: each token has one successor, so that whole answers are known beforehand.

Attention and experts add nothing to the residual stream; lm_head's row of a token is the embedding of its predecessor.
Tokens are chunks of bytes cut without regard to characters: texts whose pieces are hard to put together again.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXTS = {
    "ascii": "The quick brown fox jumps over the lazy dog, then rests for a while in the shade.",
    "cjk": "深い青の海、日本語の文章です。中文也可以,한국어도.",
    "emoji": "Done 🎉 by 👩‍💻 and 👍🏽, flags 🇯🇵 too",
    "code": "    if x:\n        return [1,  2]\n\n\tdef g(y):\n    return y",
    "space": " leading, and trailing space ",
}
EOS = 1
HIDDEN, VOCAB = 64, 256


def chunks(data, used):
    """The bytes in chunks that were not used before: three bytes by preference."""
    while data:
        size = next(size for size in (3, 2, 4, 5, 1, 6, 7) if data[:size] not in used)
        used.add(data[:size])
        yield data[:size]
        data = data[size:]


def _letters():
    """Byte-level BPE's letter of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _vocabulary():
    """Token ids by name, and each token's successor. A text's prompt is its name in angle brackets."""
    letters = _letters()
    ids, after, used = {"<bos>": 0, "<eos>": EOS}, {}, set()
    for byte in sorted(b"helo wrd"):  # the export tries the tokenizer on "hello world"
        ids[letters[byte]] = len(ids)
        used.add(bytes([byte]))
    for name, text in TEXTS.items():
        names = [f"<{name}>", *("".join(letters[b] for b in chunk) for chunk in chunks(text.encode(), used))]
        ids |= {token: len(ids) + i for i, token in enumerate(names)}
        line = [ids[token] for token in names]
        after |= dict(zip(line, [*line[1:], EOS], strict=True))
    return ids, after


def _tokenizer(ids):
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ids if token.startswith("<")]
    tokenizer.add_special_tokens(special)
    return tokenizer


def write(path, checkpoint):
    """A checkpoint folder like `checkpoint` (hidden size 64, 256 tokens) that recites."""
    shutil.copytree(checkpoint, path)
    ids, after = _vocabulary()
    codes = np.random.default_rng(0).choice([-1.0, 1.0], (VOCAB, HIDDEN)).astype(np.float32)
    head = np.zeros_like(codes)
    for token, successor in after.items():
        head[successor] += codes[token]
    assert all((head @ codes[token]).argmax() == successor for token, successor in after.items())
    for shard in path.glob("*.safetensors"):
        tensors = {name: _recited(name, tensor, codes, head) for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    _tokenizer(ids).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 1}))
    return path


def _recited(name, tensor, codes, head):
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return torch.zeros_like(tensor)
    if name == "model.norm.weight":
        return torch.ones_like(tensor)
    new = {"model.embed_tokens.weight": codes, "lm_head.weight": head}.get(name)
    return tensor if new is None else torch.from_numpy(new).to(tensor.dtype)
