"""FakeSession: a model in exact integers whose every cached value depends on all tokens before it.

A wrong page, a page that another row wrote, a stale length or a token twice changes every later logit.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from deepseek_trt.engines.sessions.session import Session
from deepseek_trt.export.bundle.graph import CacheSpec

VOCAB, PAGE = 13, 4
PRIME = 1_000_003
STALE = 777_777  # what unwritten slots hold


class Config:
    """As much of a ModelConfig as a scheduler reads."""

    vocab_size = VOCAB
    max_position_embeddings = 40
    eos_token_ids = (1,)
    pad_token_id = 0
    # What a chunk costs is counted from these: 41 a token, 3 a query with a key.
    hidden_size = num_attention_heads = num_hidden_layers = 1
    intermediate_size = 12
    q_lora_rank = None
    kv_lora_rank = qk_nope_head_dim = qk_rope_head_dim = v_head_dim = 1

    @staticmethod
    def is_moe_layer(layer):
        return False


def value_after(before, token, position):
    return (before * 31 + token * 1009 + position + 7) % PRIME


def logits_of(values):
    """Integers below 64 as float32, from all cached values: few enough for ties to come up."""
    mixed = sum((i + 3) * value for i, value in enumerate(values)) % PRIME
    return np.array([(mixed * (token + 1) // 101 + token * 7) % 64 for token in range(VOCAB)], dtype=np.float32)


def logits_after(tokens):
    """What the session must give for these tokens, computed without a cache."""
    values = [0]
    for position, token in enumerate(tokens):
        values.append(value_after(values[-1], token, position))
    return logits_of(values[1:])


def check_pages(scheduler):
    """RuntimeError when a page is lost, owned twice without being shared, or scratch and owned."""
    check_pool(scheduler.pool, [request.pages for request in [*scheduler._running, *scheduler._waiting]])


def check_pool(pool, owned):
    """RuntimeError unless the pool's books agree with `owned`, the pages of every owner, and no page is lost."""
    counts = Counter(page for pages in owned for page in pages)
    _hold(dict(counts) == pool._owners, f"owners {pool._owners} but tables hold {dict(counts)}")
    states = [*pool._blank, *pool._cached, *pool._owners]
    _hold(sorted(states) == list(range(1, pool.pages)), f"pages 1..{pool.pages - 1} are kept as {sorted(states)}")
    shared = [page for page, count in counts.items() if count > 1]
    _hold(all(page in pool._key_of for page in shared), f"of {shared} some have several owners and no key")
    named = {page: key for key, page in pool._page_of.items()}
    _hold(named == pool._key_of, "keys and pages do not name each other")
    _hold(pool._cached.keys() <= named.keys(), "a cached page has no key")
    _hold(not named.keys() & set(pool._blank), "a blank page has a key")


def _hold(condition, message):
    if not condition:
        raise RuntimeError(message)


class FakeSession(Session):
    backend, note = "fake", ""
    cache = CacheSpec(1, PAGE, 1, "float32")

    def __init__(self, pages):
        self.pages = pages
        self.slots = np.full((pages, PAGE), STALE, dtype=np.int64)
        self.calls = []
        self.failures = 0

    def prefill(self, input_ids, sequence_lengths, past_lengths, page_table):
        rows = self._rows("prefill", input_ids, sequence_lengths, past_lengths, page_table)
        return np.stack([row[-1] for row in rows])

    def decode(self, input_ids, sequence_lengths, past_lengths, page_table):
        rows = self._rows("decode", input_ids, sequence_lengths, past_lengths, page_table)
        logits = np.full((*input_ids.shape, VOCAB), 64, dtype=np.float32)  # of padding: more than any other
        for row, found in zip(logits, rows, strict=True):
            row[: len(found)] = found
        return logits

    def _rows(self, name, input_ids, sequence_lengths, past_lengths, page_table):
        """Each row's logits after every new token."""
        self.calls.append((name, input_ids.shape))
        assert input_ids.dtype == np.int64
        assert sequence_lengths.dtype == past_lengths.dtype == page_table.dtype == np.int32
        assert (sequence_lengths > 0).all()
        if self.failures:
            self.failures -= 1
            raise OSError("the device is gone")
        self._assert_rows_apart(sequence_lengths, past_lengths, page_table)
        rows = zip(input_ids, sequence_lengths, past_lengths, page_table, strict=True)
        return [self._row(ids[:count], int(past), table) for ids, count, past, table in rows]

    def _row(self, ids, past, table):
        logits = []
        for position, token in enumerate(ids.tolist(), past):
            before = self._values(position, table)[-1] if position else 0
            page = table[position // PAGE]
            assert page != 0, "a token is written to the scratch page"
            self.slots[page, position % PAGE] = value_after(before, token, position)
            logits.append(logits_of(self._values(position + 1, table)))
        return logits

    def _values(self, length, table):
        return self.slots[table].reshape(-1)[:length].tolist()

    def _assert_rows_apart(self, lengths, past, table):
        """No row writes a page that another one reads or writes."""
        for row, (count, start) in enumerate(zip(lengths, past, strict=True)):
            written = set(table[row, start // PAGE : -(-(start + count) // PAGE)].tolist())
            others = {p for other in range(len(table)) if other != row for p in table[other].tolist()} - {0}
            assert not written & others, f"pages {written & others} are written by row {row} and used by another"
