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

_NUCLEUS = 256  # candidates that top-p looks at first; eight times as many while they hold too little

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
        given = used if len(rows) == len(samplers) else used[rows]
        tokens[rows] = given.argmax(axis=1) if kind is None else _draw(given, [samplers[r] for r in rows], *kind)
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


def _grouped(samplers: Sequence[Sampler], vocab: int) -> dict[tuple[int, bool] | None, list[int]]:
    """Rows by how they are picked: None for greedy, else (width, nucleus).

    width is how many of the likeliest tokens are sorted, 0 when none need be; nucleus: top-p may need more than those.
    """
    groups: dict[tuple[int, bool] | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        params = sampler.params
        top_k = params.top_k if params.top_k < vocab else 0
        kind = (top_k, False) if top_k or params.top_p == 1.0 else (_NUCLEUS, True)
        groups.setdefault(None if params.greedy else kind, []).append(row)
    return groups


def _draw(logits: Floats, samplers: Sequence[Sampler], width: int, nucleus: bool) -> Int64s:
    """Random tokens for logits [R, vocab] of rows in one group."""
    draws = np.array([sampler.draw() for sampler in samplers])
    column = _columns(samplers)
    scaled = logits / column("temperature").astype(np.float64)
    scaled -= scaled.max(axis=1, keepdims=True)
    if not width:
        return _invert(_above(np.exp(scaled), column("min_p")), draws)
    if nucleus:
        return _draw_nucleus(scaled, column("top_p"), column("min_p"), draws, width)
    ids, weights = _likeliest(scaled, width)
    kept = _above(_nucleus(weights, weights.cumsum(axis=1)[:, -1:], column("top_p")), column("min_p"))
    return _choose(ids, _invert(kept, draws))


def _draw_nucleus(scaled: Doubles, top_p: Doubles, min_p: Doubles, draws: Doubles, width: int) -> Int64s:
    """top-p of all tokens: of the `width` likeliest, and of more for the rows where those hold less than top_p."""
    tokens = np.empty(len(scaled), dtype=np.int64)
    totals = np.exp(scaled).sum(axis=1, keepdims=True)
    left = np.arange(len(scaled))
    while len(left):
        width = min(width, scaled.shape[1])
        ids, weights = _likeliest(scaled[left], width)
        enough = (weights.cumsum(axis=1)[:, -1:] >= top_p[left] * totals[left])[:, 0] | (width == scaled.shape[1])
        rows = left[enough]
        kept = _above(_nucleus(weights[enough], totals[rows], top_p[rows]), min_p[rows])
        tokens[rows] = _choose(ids[enough], _invert(kept, draws[rows]))
        left, width = left[~enough], width * 8
    return tokens


def _likeliest(scaled: Doubles, width: int) -> tuple[Int64s, Doubles]:
    """The `width` likeliest tokens of each row, best first, of equals the lowest id; and weights, the best's 1."""
    ids = np.argpartition(-scaled, width - 1, axis=1)[:, :width]
    ids.sort(axis=1)
    values = np.take_along_axis(scaled, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.exp(np.take_along_axis(values, order, axis=1))


def _nucleus(weights: Doubles, totals: Doubles, top_p: Doubles) -> Doubles:
    """Sorted weights, zero from where those before hold top_p of the total."""
    before = np.zeros_like(weights)
    before[:, 1:] = weights.cumsum(axis=1)[:, :-1]
    return np.where((before < top_p * totals) | (top_p == 1.0), weights, 0.0)


def _above(weights: Doubles, min_p: Doubles) -> Doubles:
    """Weights, zero where below min_p; the best's weight is 1."""
    return np.where(weights >= min_p, weights, 0.0) if min_p.any() else weights


def _invert(weights: Doubles, draws: Doubles) -> Int64s:
    """The first column whose running sum exceeds the draw's share of the row's total."""
    running = weights.cumsum(axis=1)
    totals = running[:, -1]
    wanted = np.minimum(draws * totals, np.nextafter(totals, 0))
    columns: Int64s = (running <= wanted[:, None]).sum(axis=1)
    return columns


def _choose(ids: Int64s, columns: Int64s) -> Int64s:
    return np.take_along_axis(ids, columns[:, None], axis=1)[:, 0]


def _columns(samplers: Sequence[Sampler]) -> Any:
    """A function from a parameter's name to its values as [R, 1]."""
    return lambda name: np.array([[getattr(sampler.params, name)] for sampler in samplers], dtype=np.float64)


def _require(condition: bool, field: str, value: object, mend: str) -> None:
    if not condition:
        raise RequestError(f"{field} {value!r}: {mend}")
