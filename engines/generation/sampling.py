"""Sampling: from logits to the next token of every row at once.

A row's token depends on its own logits, parameters, seed and history alone, never on what else is in the batch. The
compiled sampler and numpy's pick the same tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_trt.engines.generation.sampling_numpy import log_probabilities, pick_rows
from deepseek_trt.export.arrays import Floats
from deepseek_trt.export.errors import RequestError
from deepseek_trt.plugins.cpu.sampler import NativeSampler
from deepseek_trt.plugins.cpu.sampling_row import PAIR, History, SamplingRow, key_of, pack, steepness

# A picked token, and where they were asked for its log-probability and the likeliest tokens (see sampling_row.unpack).
# A class of its own would take five times as long to make as a tuple, once a token.
Choice = tuple[int, float | None, bytes]


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


class Sampler:
    """One request's randomness and history."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = (), stops: Sequence[int] = ()) -> None:
        """`stops` are the tokens that may not be picked before params.min_tokens."""
        self.params = params
        self.logprobs = -1 if params.logprobs is None else params.logprobs
        self.row = SamplingRow(
            top_p=params.top_p,
            min_p=params.min_p,
            key=key_of(params.seed),
            steepness=steepness(params.temperature),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            top_k=min(params.top_k, 2**31 - 1),
            logprobs=self.logprobs,
            min_tokens=params.min_tokens,
        )
        self.address = ctypes.addressof(self.row)
        self._history = History(self.row, prompt, params.max_new_tokens) if params.penalised else None
        self._stops = np.array(stops, dtype=np.int32)
        self.row.banned, self.row.banned_count = self._stops.ctypes.data, len(self._stops)

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return int(self.row.made)

    def pick(self, logits: Floats) -> int:
        """The next token for logits [vocab]; of equal logits greedy takes the lowest id."""
        return sample_rows([self], logits[None])[0][0]


def sample_rows(samplers: Sequence[Sampler], logits: Floats, native: NativeSampler | None = None) -> list[Choice]:
    """Pick a token for every row of logits [B, vocab], and remember it in the row's sampler."""
    return _native(samplers, logits, native) if native else _numpy(samplers, logits)


def with_logprobs(logits: Floats, token: int, count: int) -> Choice:
    """`token` with its log-probability under softmax(logits [vocab]), and those of the `count` likeliest tokens."""
    own, ids, values = log_probabilities(logits, token, count)
    return token, own, pack(ids, values)


def _numpy(samplers: Sequence[Sampler], logits: Floats) -> list[Choice]:
    tokens = pick_rows([sampler.row for sampler in samplers], logits)
    return [
        (token, None, b"") if sampler.logprobs < 0 else with_logprobs(row, token, sampler.logprobs)
        for sampler, row, token in zip(samplers, logits, tokens, strict=True)
    ]


def _native(samplers: Sequence[Sampler], logits: Floats, native: NativeSampler) -> list[Choice]:
    tokens, logprobs, tops = native.pick(samplers, logits)
    made = list(zip(tokens, logprobs, tops, strict=True))
    if native.alike:
        return made
    return [_less(choice, sampler.logprobs) for choice, sampler in zip(made, samplers, strict=True)]


def _less(choice: Choice, count: int) -> Choice:
    """What a row gets that asked for fewer log-probabilities than another, or for none."""
    token, logprob, top = choice
    return (token, None, b"") if count < 0 else (token, logprob, top[: count * PAIR.size])


def _require(condition: bool, field: str, value: object, mend: str) -> None:
    if not condition:
        raise RequestError(f"{field} {value!r}: {mend}")
