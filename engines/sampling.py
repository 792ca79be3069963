"""Sampling: from logits to the next token of every row at once.

A row's token depends on its own logits, parameters, seed and history alone: sums run in an order that the batch cannot
change, and rows are grouped only with rows of the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.session import Floats, Int64s
from deepseek_trt.export.errors import RequestError

_BLOCK = 64  # weights that are summed before a draw chooses among the sums
_PART = 65536  # logits that are drawn from at once
_COLDEST = 1e-30  # lower temperatures are taken as this one, which float32 can divide by

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks tokens, and when it ends.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token. They apply in this order: penalties,
    temperature, top_k, top_p of what is left, min_p as a share of the likeliest token's probability.
    repetition_penalty divides positive and multiplies negative logits of tokens in prompt or answer (arXiv:1909.05858);
    presence_penalty is subtracted once, frequency_penalty once an occurrence, from tokens in the answer.
    stop strings are left out of the text; stop tokens end the answer beside the model's own, which ignore_eos ignores.
    Before min_tokens no stop counts. logprobs: None for none, n for the chosen token's and the n likeliest tokens'
    natural log-probabilities, of the model's own distribution: before penalties and temperature.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        _require(0 <= self.temperature < np.inf, "temperature", self.temperature, "must be finite and not negative")
        _require(self.top_k >= 0, "top_k", self.top_k, "must not be negative (0 keeps all)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        _require(self.seed >= 0, "seed", self.seed, "must not be negative")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie in [0, 1]")
        _require(0 < self.repetition_penalty < np.inf, "repetition_penalty", self.repetition_penalty, "must be above 0")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "must lie in [-2, 2]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "must lie in [-2, 2]")
        _require(not isinstance(self.stop, str), "stop", self.stop, "must be a tuple of strings, not one string")
        _require(all(self.stop), "stop", self.stop, "must hold no empty string")
        lowest = min(self.stop_token_ids, default=0)
        _require(lowest >= 0, "stop_token_ids", self.stop_token_ids, "must not be negative")
        _require(0 <= self.min_tokens <= self.max_new_tokens, "min_tokens", self.min_tokens, self._min_tokens_range())
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "must be None or not negative")

    def _min_tokens_range(self) -> str:
        return f"must lie between 0 and max_new_tokens, {self.max_new_tokens}"

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


@dataclass(frozen=True)
class Choice:
    """A picked token; logprob and the likeliest tokens (id, logprob), best first, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One request's randomness and history."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = (), stops: Sequence[int] = ()) -> None:
        """`stops` are the tokens that may not be picked before params.min_tokens."""
        self.params = params
        self.made = 0
        self._stops = stops
        self._random = np.random.default_rng(params.seed)
        self._counts: dict[int, int] = dict.fromkeys(prompt, 0) if params.penalised else {}  # in the answer

    def pick(self, logits: Floats) -> int:
        """The next token for logits [vocab]; of equal logits greedy takes the lowest id."""
        return sample_rows([self], logits[None])[0].token

    def draw(self) -> float:
        return float(self._random.random())

    def record(self, token: int) -> None:
        self.made += 1
        if self.params.penalised:
            self._counts[token] = self._counts.get(token, 0) + 1

    @property
    def banned(self) -> Sequence[int]:
        return self._stops if self.made < self.params.min_tokens else ()

    @property
    def adjusts(self) -> bool:
        return bool(self._counts) or bool(self.banned)

    def adjusted(self, logits: Floats) -> Floats:
        """A copy of logits [vocab] with penalties and bans."""
        result: Floats = logits.copy()
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            params, seen = self.params, logits[ids]
            factor = np.float32(params.repetition_penalty)
            seen = np.where(seen > 0, seen / factor, seen * factor)
            seen = seen - np.float32(params.presence_penalty) * (counts > 0)
            result[ids] = seen - np.float32(params.frequency_penalty) * counts
        result[list(self.banned)] = -np.inf
        return result


def sample_rows(samplers: Sequence[Sampler], logits: Floats) -> list[Choice]:
    """Pick a token for every row of logits [B, vocab], and remember it in the row's sampler."""
    used = _adjusted_rows(samplers, logits)
    tokens = np.empty(len(samplers), dtype=np.int64)
    for kind, rows in _grouped(samplers, logits.shape[1]).items():
        if kind is None:
            tokens[rows] = (used if len(rows) == len(samplers) else used[rows]).argmax(axis=1)
            continue
        for part in _parts(rows, logits.shape[1]):
            tokens[part] = _draw(used[part], [samplers[row] for row in part], kind)
    choices = [Choice(int(token)) for token in tokens]
    for row, sampler in enumerate(samplers):
        if sampler.params.logprobs is not None:
            choices[row] = with_logprobs(logits[row], choices[row].token, sampler.params.logprobs)
        sampler.record(choices[row].token)
    return choices


def with_logprobs(logits: Floats, token: int, count: int) -> Choice:
    """`token` with its log-probability under softmax(logits [vocab]), and those of the `count` likeliest tokens."""
    exact = logits.astype(np.float64)
    best = exact.max()
    total = best + np.log(np.exp(exact - best).sum())
    count = min(count, len(exact))
    likeliest = np.argpartition(-exact, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
    likeliest = likeliest[np.lexsort((likeliest, -exact[likeliest]))]
    top = tuple((int(i), float(exact[i] - total)) for i in likeliest)
    return Choice(token, float(exact[token] - total), top)


def _adjusted_rows(samplers: Sequence[Sampler], logits: Floats) -> Floats:
    rows = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if not rows:
        return logits
    used: Floats = logits.copy()
    for row in rows:
        used[row] = samplers[row].adjusted(logits[row])
    return used


def _grouped(samplers: Sequence[Sampler], vocab: int) -> dict[int | None, list[int]]:
    """Rows by how they are picked: None for greedy, else how many of the likeliest tokens top-k keeps, 0 for all."""
    groups: dict[int | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        params = sampler.params
        top_k = params.top_k if params.top_k < vocab else 0
        groups.setdefault(None if params.greedy else top_k, []).append(row)
    return groups


def _parts(rows: list[int], vocab: int) -> list[list[int]]:
    """Rows a few at a time: arrays that fit into a core's cache cost far less to make than those of all rows."""
    size = max(_PART // vocab, 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _draw(logits: Floats, samplers: Sequence[Sampler], top_k: int) -> Int64s:
    """Random tokens for logits [R, vocab] of rows with the same top_k."""
    column = _columns(samplers)
    top_p, min_p = column("top_p"), column("min_p")
    scaled = logits - logits.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest token alone
        scaled /= np.maximum(column("temperature"), _COLDEST).astype(np.float32)
    if not top_k:
        return _draw_by_rejection(_padded(np.exp(scaled)), samplers, top_p, min_p)
    ids = _likeliest(scaled, top_k)
    weights = np.exp(np.take_along_axis(scaled, ids, axis=1)).astype(np.float64)
    kept = _above(_nucleus(weights, top_p), min_p)
    columns = _invert(kept, _draws(samplers))
    return np.take_along_axis(ids, columns[:, None], axis=1)[:, 0]


def _draw_by_rejection(weights: Doubles, samplers: Sequence[Sampler], top_p: Doubles, min_p: Doubles) -> Int64s:
    """Tokens drawn by weights [R, N], whose largest is 1, within top-p and min-p, and without sorting.

    A drawn token counts when the likelier ones hold less than top_p. If not, no token from it on can count, and the
    next draw is among the likelier ones alone: that leaves the chances within top-p as they are.
    """
    kept = _above(weights, min_p)
    tokens = _draw_in_blocks(kept, _draws(samplers))
    wanted = top_p[:, 0] * _blocks(weights).sum(axis=2).sum(axis=1)
    for row in np.flatnonzero(top_p[:, 0] < 1.0).tolist():
        likelier = _likelier(kept[row], tokens[row])
        while likelier.sum() >= wanted[row]:
            tokens[row] = _draw_in_blocks(likelier[None], _draws(samplers[row : row + 1]))[0]
            likelier = _likelier(likelier, tokens[row])
    return tokens


def _likelier(weights: Doubles, picked: int) -> Doubles:
    """Weights [N], zero but for tokens before the picked one; of equals the lowest id comes first."""
    keep = weights > weights[picked]
    keep[:picked] |= weights[:picked] == weights[picked]
    result: Doubles = weights * keep
    return result


def _padded(weights: Floats) -> Doubles:
    """Weights [R, vocab] with zeros up to a whole number of blocks."""
    rows, vocab = weights.shape
    padded = np.zeros((rows, -(-vocab // _BLOCK) * _BLOCK))
    padded[:, :vocab] = weights
    return padded


def _blocks(weights: Doubles) -> Doubles:
    return weights.reshape(len(weights), -1, _BLOCK)


def _draw_in_blocks(weights: Doubles, draws: Doubles) -> Int64s:
    """`_invert` of weights [R, N] without a running sum over all: first a block, then a column of it."""
    blocks = _blocks(weights)
    totals = blocks.sum(axis=2)
    block = _invert(totals, draws)
    rows = np.arange(len(weights))
    before = totals.cumsum(axis=1)[rows, block] - totals[rows, block]
    within = (draws * totals.cumsum(axis=1)[:, -1] - before) / totals[rows, block]
    return block * _BLOCK + _invert(blocks[rows, block], np.clip(within, 0.0, 1.0))


def _likeliest(scaled: Floats, count: int) -> Int64s:
    """The ids [R, count] of the likeliest tokens of each row, best first, of equals the lowest id."""
    lowest = np.partition(scaled, scaled.shape[1] - count, axis=1)[:, -count]
    ids = np.empty((len(scaled), count), dtype=np.int64)
    for row, (values, edge) in enumerate(zip(scaled, lowest, strict=True)):
        candidates = np.flatnonzero(values >= edge)  # more than count where several are on the edge
        ids[row] = candidates[np.argsort(-values[candidates], kind="stable")[:count]]
    return ids


def _nucleus(weights: Doubles, top_p: Doubles) -> Doubles:
    """Sorted weights, zero from where those before hold top_p of the total."""
    running = weights.cumsum(axis=1)
    before = np.zeros_like(weights)
    before[:, 1:] = running[:, :-1]
    return np.where((before < top_p * running[:, -1:]) | (top_p == 1.0), weights, 0.0)


def _above(weights: Doubles, min_p: Doubles) -> Doubles:
    """Weights, zero where below min_p; the likeliest token's weight is 1."""
    return np.where(weights >= min_p, weights, 0.0) if min_p.any() else weights


def _invert(weights: Doubles, draws: Doubles) -> Int64s:
    """The first column whose running sum in weights [R, N] exceeds the draw's share of the row's total."""
    running = weights.cumsum(axis=1)
    totals = running[:, -1]
    wanted = np.minimum(draws * totals, np.nextafter(totals, 0))
    columns: Int64s = (running <= wanted[:, None]).sum(axis=1)
    return columns


def _draws(samplers: Sequence[Sampler]) -> Doubles:
    return np.array([sampler.draw() for sampler in samplers])


def _columns(samplers: Sequence[Sampler]) -> Any:
    """A function from a parameter's name to its values as [R, 1]."""
    return lambda name: np.array([[getattr(sampler.params, name)] for sampler in samplers], dtype=np.float64)


def _require(condition: bool, field: str, value: object, mend: str) -> None:
    if not condition:
        raise RequestError(f"{field} {value!r}: {mend}")
