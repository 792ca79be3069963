"""What the sampling kernels are given for a batch, and what their results say. No Triton here.

`packed` lays rows out as the kernels' arguments; `taken` turns the results into what the CPU samplers give, and has the
rows record it, which is the only thing that changes them: a call that fails in between has done nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_trt.export.arrays import Array, Arrays, Floats, Int32s
from deepseek_trt.plugins.cpu.sampling_row import NOT_FINITE, SamplingRow, pack
from deepseek_trt.plugins.kernels.launches import SAMPLING_TOPS

MOST_CHANGES = 16384  # tokens of a row with a penalty, a bias or a ban
_HEAVIEST = 2**30
_UNSEEN = np.float32(-1)
_NONE = tuple(np.empty(0, dtype=dtype) for dtype in (np.int32, *[np.float32] * 3))

# A token, and where they were asked for its log-probability and the likeliest tokens (see sampling_row.unpack).
Picked = tuple[int, float | None, bytes]


def takes(row: SamplingRow) -> bool:
    """Whether the kernels do all that the row asks for: no mask, not too many likeliest tokens, and no longer history.

    Constant while a request runs, but for its history.
    """
    return not row.mask and row.logprobs <= SAMPLING_TOPS and changes_of(row) <= MOST_CHANGES


def changes_of(row: SamplingRow) -> int:
    """Tokens with a penalty, a bias or a ban, at most."""
    return int(row.seen_count + row.biased_count + row.banned_count)


def packed(rows: Sequence[SamplingRow], places: Int32s) -> Arrays:
    """The arguments that are read, by name, beside the logits: row r's are logits[places[r]]."""
    changes = [_changes(row) if changes_of(row) else _NONE for row in rows]
    some = [change for change in changes if change is not _NONE] or [_NONE]
    ids, counts, drops, biases = (np.concatenate(parts) for parts in zip(*some, strict=True))
    column = {name: np.array([getattr(row, field) for row in rows], dtype) for name, (field, dtype) in _FIELDS.items()}
    return {
        "places": np.asarray(places, dtype=np.int32),
        "starts": np.cumsum([0, *(len(part[0]) for part in changes)], dtype=np.int32),
        **column,
        "keys": np.array([row.key for row in rows], dtype=np.uint64).view(np.int64),
        "leasts": np.array([math.ceil(row.min_p * _HEAVIEST) for row in rows], dtype=np.int32),
        "ids": ids,
        "counts": counts,
        "drops": drops,
        "biases": biases,
    }


_FIELDS = {
    "draws": ("draws", np.int64),
    "steepness": ("steepness", np.float32),
    "top_ps": ("top_p", np.float64),
    "top_ks": ("top_k", np.int32),
    "wanted": ("logprobs", np.int32),
    "repetitions": ("repetition", np.float32),
    "presences": ("presence", np.float32),
}


def _changes(row: SamplingRow) -> tuple[Int32s, Floats, Floats, Floats]:
    """Tokens, each once: how often it came in the answer (-1: no penalties), the penalty for that, and its bias."""
    ids, counts = row.history()
    drops = np.float32(row.frequency) * counts
    if not row.biased_count and not len(row.bans()):
        return ids, counts, drops, np.zeros_like(counts)
    added = dict(zip(*(array.tolist() for array in row.bias()), strict=True))
    added.update(dict.fromkeys(row.bans().tolist(), -math.inf))
    others = np.array(sorted(added.keys() - set(ids.tolist())), dtype=np.int32)
    every = np.concatenate([ids, others])
    biases = np.array([added.get(token, 0.0) for token in every.tolist()], dtype=np.float32)
    unseen = np.full(len(others), _UNSEEN)
    return every, np.concatenate([counts, unseen]), np.concatenate([drops, np.zeros_like(unseen)]), biases


@dataclass(frozen=True)
class ResultSpec:
    """An argument that is written: [rows], or [rows, SAMPLING_TOPS]."""

    name: str
    dtype: type[np.generic]
    wide: bool = False

    def nbytes(self, rows: int) -> int:
        """Of so many rows."""
        return rows * (SAMPLING_TOPS if self.wide else 1) * np.dtype(self.dtype).itemsize


# Only the first two are read where no row wants log-probabilities.
RESULTS = (
    ResultSpec("tokens", np.int32),
    ResultSpec("used", np.int64),
    ResultSpec("totals", np.float64),
    ResultSpec("bests", np.float32),
    ResultSpec("owns", np.float32),
    ResultSpec("top_ids", np.int32, wide=True),
    ResultSpec("top_logits", np.float32, wide=True),
)
NEEDED = RESULTS[:2]


def results_of(rows: Sequence[SamplingRow]) -> tuple[ResultSpec, ...]:
    """Those results of `rows` that are read."""
    return RESULTS if any(row.logprobs >= 0 for row in rows) else NEEDED


def taken(rows: Sequence[SamplingRow], results: Mapping[str, Array], vocab: int) -> list[Picked]:
    """What was picked, which the rows record, as they do the draws that they used; a row of NOT_FINITE is left be."""
    picked: list[Picked] = []
    for index, (row, token) in enumerate(zip(rows, results["tokens"].tolist(), strict=True)):
        if token == NOT_FINITE:
            picked.append((NOT_FINITE, None, b""))
            continue
        measured = row.logprobs >= 0
        picked.append((token, *_measured(results, index, min(row.logprobs, vocab))) if measured else (token, None, b""))
        row.draws = int(results["used"][index])
        row.record(token)
    return picked


def _measured(results: Mapping[str, Array], index: int, count: int) -> tuple[float, bytes]:
    """The token's log-probability, and the `count` likeliest tokens'."""
    total = float(results["bests"][index]) + float(np.log(results["totals"][index] / _HEAVIEST))
    logits = results["top_logits"][index, :count].astype(np.float64)
    top = pack(results["top_ids"][index, :count].tolist(), (logits - total).tolist()) if count else b""
    return float(results["owns"][index]) - total, top
