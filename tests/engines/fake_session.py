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


class DraftingSession(FakeSession):
    """With a layer that drafts rightly wherever its own slots are right, and an eye on what it is given.

    The hidden state at a position is the value that is cached there. Slot i of the layer holds what the value at i + 1
    must be; only behind the end of a shared page, whose next token was another's, may that be wrong.
    """

    cache = CacheSpec(2, PAGE, 1, "float32")
    drafts = True

    def __init__(self, pages):
        super().__init__(pages)
        self.taken = np.full((pages, PAGE), STALE, dtype=np.int64)
        self.gone = 0  # calls of draft that fail

    def _rows(self, name, input_ids, sequence_lengths, past_lengths, page_table):
        rows = super()._rows(name, input_ids, sequence_lengths, past_lengths, page_table)
        self.hidden = np.full((*input_ids.shape, 1), np.nan, dtype=np.float32)
        for row, (count, past, table) in enumerate(zip(sequence_lengths, past_lengths, page_table, strict=True)):
            self.hidden[row, :count, 0] = self._values(past + count, table)[past:]
        return rows

    def draft(self, input_ids, hidden, sequence_lengths, past_lengths, page_table):
        self.calls.append(("draft", input_ids.shape))
        if self.gone:
            self.gone -= 1
            raise OSError("the device is gone")
        assert hidden.dtype == np.float32
        assert hidden.shape == (*input_ids.shape, 1)
        self._assert_rows_apart(sequence_lengths, past_lengths, page_table)
        rows = zip(input_ids, hidden, sequence_lengths, past_lengths, page_table, strict=True)
        made = [
            self._drafted(ids[:count], states[:count, 0], int(past), table) for ids, states, count, past, table in rows
        ]
        logits, values = zip(*made, strict=True)
        self.hidden = np.array(values, dtype=np.float32)[:, None]
        return np.stack(logits)

    def _drafted(self, ids, states, past, table):
        """Logits after the last token, and the state there."""
        for slot, (token, state) in enumerate(zip(ids.tolist(), states.tolist(), strict=True), past):
            page, at = table[slot // PAGE], slot % PAGE
            assert page != 0, "the layer's slot lies in the scratch page"
            before = self.taken[table].reshape(-1)[:slot]
            assert not (before == STALE).any(), "a state was left out"
            drafted = before[-1] if slot else None
            assert state in (self.slots[page, at], drafted), "a state of another position"
            self.taken[page, at] = value_after(int(state), token, slot + 1)
        first = self._values(1, table)
        return logits_of([*first, *self.taken[table].reshape(-1)[: past + len(ids)].tolist()]), self.taken[page, at]
