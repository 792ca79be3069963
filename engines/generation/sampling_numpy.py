"""Sampling in numpy: the reference of the compiled sampler, number for number, and what runs where there is none.

Weights are integers, so that their sums are exact in any order: a row's token depends on its own logits, parameters,
seed and history alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Floats, Int64s
from deepseek_trt.plugins.cpu.sampling_row import NOT_FINITE, SamplingRow

_SHIFT, _HEAVIEST = np.float32(1.5 * 2**23), 2**30
_POLYNOMIAL = (9.671512991189957e-3, 5.550733581185341e-2, 0.24022242426872253, 0.6931470036506653, 1.0)
_LOG2E = np.float32(1.44269504)
_LOWEST = np.finfo(np.float32).min
_BLOCK = 256  # logits whose powers are summed together
_PART = 65536  # logits that are worked on at once
_MASK = 2**64 - 1

Doubles = npt.NDArray[np.float64]
Rows = Sequence[SamplingRow]


def pick_rows(rows: Rows, logits: Floats) -> list[int]:
    """The next token of every row of logits [B, vocab], which the rows record, as they do the draws they use.

    NOT_FINITE, and nothing recorded, where a row holds NaN or infinity, or no number above float32's least.
    """
    top = logits.argmax(axis=1)  # the first NaN, where there is one
    best = logits[np.arange(len(rows)), top]
    good: list[int] = np.flatnonzero((best > _LOWEST) & (best < np.inf)).tolist()  # NaN is neither
    if len(good) == len(rows):
        return _pick_finite(rows, logits, top)
    tokens = np.full(len(rows), NOT_FINITE)
    if len(good):
        tokens[good] = _pick_finite([rows[row] for row in good], logits[good], top[good])
    picked: list[int] = tokens.tolist()
    return picked


def _pick_finite(rows: Rows, logits: Floats, top: Int64s) -> list[int]:
    """`top` [B] are the largest logits' tokens."""
    used = _adjusted_rows(rows, logits)
    open_ = [index for index, row in enumerate(rows) if not row.mask or used[index].max() > _LOWEST]
    if len(open_) < len(rows):
        left = np.full(len(rows), NOT_FINITE)
        if open_:
            left[open_] = _pick_finite([rows[index] for index in open_], logits[open_], top[open_])
        made: list[int] = left.tolist()
        return made
    tokens = np.empty(len(rows), dtype=np.int64)
    for top_k, members in _grouped(rows, logits.shape[1]).items():
        if top_k == 1:
            tokens[members] = top[members] if used is logits else used[members].argmax(axis=1)
            continue
        for part in _parts(members, logits.shape[1]):
            tokens[part] = _draw(used[part], [rows[row] for row in part], top_k)
    for row, token in zip(rows, tokens.tolist(), strict=True):
        row.record(token)
    picked: list[int] = tokens.tolist()
    return picked


def log_probabilities(logits: Floats, token: int, count: int) -> tuple[float, list[int], list[float]]:
    """Under softmax(logits [vocab]): `token`'s, and ids and values of the `count` likeliest, best first."""
    total = _log_sum(logits)
    ids = _likeliest(logits[None], count)[0] if 0 < count < len(logits) else np.arange(len(logits) if count else 0)
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return float(logits[token]) - total, ids.tolist(), (logits[ids].astype(np.float64) - total).tolist()


def next_draw(row: SamplingRow) -> float:
    """The next number of the row's own sequence (splitmix64), in [0, 1)."""
    row.draws += 1
    z = (row.key + row.draws * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return float((z ^ z >> 31) >> 11) * 2.0**-53


def _powers(y: Floats) -> Floats:
    """2^(30 + y) for y <= 0: 2^n from the bits of a sum, times a polynomial of the rest."""
    y = np.maximum(y, np.float32(-80))
    shifted = y + _SHIFT
    rest = (y - (shifted - _SHIFT)).astype(np.float64)
    value = np.full(y.shape, np.float32(1.326472614891827e-3) * np.float32(_HEAVIEST))
    for factor in _POLYNOMIAL:  # each product and sum rounded once, as a fused multiply-add does
        value = (value * rest + np.float32(factor) * np.float32(_HEAVIEST)).astype(np.float32)
    powers: Floats = (value.view(np.int32) + (shifted.view(np.int32) << 23)).view(np.float32)
    return powers


def _log_sum(logits: Floats) -> float:
    """The natural logarithm of the sum of e^logits [vocab], eight at a time in float32 and those sums in float64."""
    padded = np.full(-(-len(logits) // _BLOCK) * _BLOCK, -np.inf, dtype=np.float32)
    padded[: len(logits)] = logits
    best = logits.max()
    parts = _powers((padded - best) * _LOG2E).reshape(-1, 8, _BLOCK // 8)
    sums = parts[:, 0]
    for part in range(1, 8):
        sums = sums + parts[:, part]
    return float(best) + float(np.log(sums.sum(dtype=np.float64) / _HEAVIEST))


def _adjusted_rows(rows: Rows, logits: Floats) -> Floats:
    changed = [i for i, row in enumerate(rows) if row.seen_count or row.biased_count or row.mask or len(row.bans())]
    if not changed:
        return logits
    used: Floats = logits.copy()
    for index in changed:
        used[index] = adjusted(rows[index], logits[index])
    return used


def adjusted(row: SamplingRow, logits: Floats) -> Floats:
    """A copy of logits [vocab] with the row's penalties, biases, bans and mask."""
    result: Floats = logits.copy()
    ids, counts = row.history()
    if len(ids):
        seen = logits[ids]
        repeated = np.where(seen > 0, seen / np.float32(row.repetition), seen * np.float32(row.repetition))
        present = repeated - np.float32(row.presence) * (counts > 0)
        result[ids] = present - np.float32(row.frequency) * counts
    biased, biases = row.bias()
    result[biased] += biases
    result[row.bans()] = -np.inf
    allowed = row.allowed(len(logits))
    return result if allowed is None else np.where(allowed, result, np.float32(-np.inf))


def _grouped(rows: Rows, vocab: int) -> dict[int, list[int]]:
    """Rows by how many of the likeliest tokens are kept: 1 is greedy, 0 all."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        top_k = row.top_k if row.top_k < vocab else 0
        groups.setdefault(1 if row.steepness == 0 else top_k, []).append(index)
    return groups


def _parts(members: list[int], vocab: int) -> list[list[int]]:
    """Rows a few at a time: arrays that fit into a core's cache cost far less to make than those of all rows."""
    size = max(_PART // vocab, 1)
    return [members[start : start + size] for start in range(0, len(members), size)]


def _draw(logits: Floats, rows: Rows, top_k: int) -> Int64s:
    """Random tokens for logits [R, vocab] of rows with the same top_k."""
    ids = _likeliest(logits, top_k) if top_k else None
    kept = logits if ids is None else np.take_along_axis(logits, ids, axis=1)
    steepness = _column(rows, "steepness").astype(np.float32)
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest token alone
        powers = _powers((kept - np.maximum(kept.max(axis=1, keepdims=True), _LOWEST)) * steepness)
    columns = _draw_columns(powers.astype(np.int64), rows)  # rounded down
    return columns if ids is None else np.take_along_axis(ids, columns[:, None], axis=1)[:, 0]


def _draw_columns(weights: Int64s, rows: Rows) -> Int64s:
    """Columns drawn by weights [R, N], whose largest is 2^30, within top-p and min-p, and without sorting.

    A drawn token counts when the likelier ones hold less than top_p. If they do not, no token from it on can count, and
    the next draw is among the likelier ones alone: that leaves the chances within top-p as they are.
    """
    wanted = _column(rows, "top_p")[:, 0] * weights.sum(axis=1)
    kept = np.where(weights >= np.ceil(_column(rows, "min_p") * _HEAVIEST), weights, 0)
    columns = _invert(kept, np.array([next_draw(row) for row in rows]))
    for index, row in enumerate(rows):
        if row.top_p == 1.0:
            continue
        likelier = _likelier(kept[index], columns[index])
        while likelier.sum() >= wanted[index] > 0:
            columns[index] = _invert(likelier[None], np.array([next_draw(row)]))[0]
            likelier = _likelier(likelier, columns[index])
    return columns


def _likelier(weights: Int64s, picked: int) -> Int64s:
    """Weights [N], zero but for tokens before the picked one; of equals the lowest id comes first."""
    keep = weights > weights[picked]
    keep[:picked] |= weights[:picked] == weights[picked]
    result: Int64s = weights * keep
    return result


def _likeliest(logits: Floats, count: int) -> Int64s:
    """The ids [R, count] of the largest logits of each row, in order of id; of equal ones the lowest ids."""
    lowest = np.partition(logits, logits.shape[1] - count, axis=1)[:, -count]
    ids = np.empty((len(logits), count), dtype=np.int64)
    for row, (values, edge) in enumerate(zip(logits, lowest, strict=True)):
        above = np.flatnonzero(values > edge)
        ids[row] = np.sort(np.concatenate([above, np.flatnonzero(values == edge)[: count - len(above)]]))
    return ids


def _invert(weights: Int64s, draws: Doubles) -> Int64s:
    """The first column whose running sum in weights [R, N] exceeds the draw's share of the row's total."""
    running = weights.cumsum(axis=1)
    totals = running[:, -1]
    wanted = np.minimum((draws * totals).astype(np.int64), totals - 1)
    columns: Int64s = (running <= wanted[:, None]).sum(axis=1)
    return columns  # 0 where all is banned


def _column(rows: Rows, name: str) -> Any:
    """A field of all rows as [R, 1]."""
    return np.array([[getattr(row, name)] for row in rows], dtype=np.float64)
