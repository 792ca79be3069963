"""Sampling: from logits to the next token of every row at once.

A row's token depends on its own logits, parameters, seed and history alone, never on what else is in the batch. The
compiled sampler and numpy's pick the same tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.generation.sampling_numpy import log_probabilities, pick_rows
from deepseek_trt.engines.sessions.holding import Holding
from deepseek_trt.export.arrays import Floats, Int32s
from deepseek_trt.plugins.cpu.sampler import NativeSampler
from deepseek_trt.plugins.cpu.sampling_row import PAIR, History, SamplingRow, key_of, pack, steepness

if TYPE_CHECKING:
    from deepseek_trt.engines.generation.guiding import RowGuide  # which takes a tokenizer

# A picked token, and where they were asked for its log-probability and the likeliest tokens (see sampling_row.unpack).
# A class of its own would take five times as long to make as a tuple, once a token.
Choice = tuple[int, float | None, bytes]


class Sampler:
    """One request's randomness and history."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        stops: Sequence[int] = (),
        room: int | None = None,
        guide: RowGuide | None = None,
    ) -> None:
        """`stops` are the tokens that may not be picked before params.min_tokens; `room` is for that many tokens."""
        self.params, self.guide = params, guide
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
        room = params.max_new_tokens if room is None else room
        self._history = History(self.row, prompt, room) if params.penalised else None
        self._stops = np.array(stops, dtype=np.int32)
        self.row.banned, self.row.banned_count = self._stops.ctypes.data, len(self._stops)
        self._biased = np.array([token for token, _ in params.logit_bias], dtype=np.int32)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self.row.biased, self.row.biases = self._biased.ctypes.data, self._biases.ctypes.data
        self.row.biased_count = len(self._biased)

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return int(self.row.made)


def sample_rows(samplers: Sequence[Sampler], logits: Floats, native: NativeSampler | None = None) -> list[Choice]:
    """Pick a token for every row of logits [B, vocab], and remember it in the row's sampler.

    Of equal logits greedy takes the lowest id. Where a row holds NaN or infinity, or no number at all, the token is
    NOT_FINITE, and nothing is remembered.
    """
    for sampler in samplers:
        if sampler.guide:
            sampler.guide.prepare(sampler.row)
    return _native(samplers, logits, native) if native else _numpy(samplers, logits)


class Picking:
    """Picks rows' tokens where their logits are: in this process's memory, or on a session's device."""

    def __init__(self, native: NativeSampler | None, holding: Holding | None = None) -> None:
        self._native, self._holding = native, holding

    def choices(self, samplers: Sequence[Sampler], logits: Floats | Int32s) -> Sequence[Choice | Exception]:
        """Each row's next token, or what its sampling raised; `logits` are [B, vocab], or places [B] of `holding`."""
        if self._holding is None:
            return _each(self._sample, samplers, logits)
        held = [sampler.guide is None and self._holding.picks(sampler.row) for sampler in samplers]
        if all(held):
            return _each(self._pick, samplers, logits)
        made: dict[int, Choice | Exception] = {}
        for pick, wanted in ((self._pick, True), (self._read_and_sample, False)):
            rows = [index for index, own in enumerate(held) if own is wanted]
            if rows:
                made.update(zip(rows, _each(pick, [samplers[row] for row in rows], logits[rows]), strict=True))
        return [made[row] for row in range(len(samplers))]

    def _sample(self, samplers: Sequence[Sampler], logits: Any) -> list[Choice]:
        return sample_rows(samplers, logits, self._native)

    def _pick(self, samplers: Sequence[Sampler], places: Any) -> list[Choice]:
        assert self._holding
        return self._holding.pick([sampler.row for sampler in samplers], places)

    def _read_and_sample(self, samplers: Sequence[Sampler], places: Any) -> list[Choice]:
        assert self._holding
        return sample_rows(samplers, self._holding.read(places), self._native)


def _each(
    pick: Callable[[Sequence[Sampler], Any], list[Choice]], samplers: Sequence[Sampler], logits: Any
) -> Sequence[Choice | Exception]:
    """What `pick` gives for all rows; where it raises, which records nothing, for each by itself, or its error."""
    try:
        return pick(samplers, logits)
    except Exception:
        return [_one(pick, sampler, logits[row : row + 1]) for row, sampler in enumerate(samplers)]


def _one(pick: Callable[[Sequence[Sampler], Any], list[Choice]], sampler: Sampler, logits: Any) -> Choice | Exception:
    try:
        return pick([sampler], logits)[0]
    except Exception as error:
        return error


def with_logprobs(logits: Floats, token: int, count: int) -> Choice:
    """`token` with its log-probability under softmax(logits [vocab]), and those of the `count` likeliest tokens."""
    own, ids, values = log_probabilities(logits, token, count)
    return token, own, pack(ids, values)


def _numpy(samplers: Sequence[Sampler], logits: Floats) -> list[Choice]:
    rows = [sampler.row for sampler in samplers]
    draws = [row.draws for row in rows]
    try:
        tokens = pick_rows(rows, logits)
    except Exception:  # nothing is recorded yet, and each row can be tried by itself
        for row, before in zip(rows, draws, strict=True):
            row.draws = before
        raise
    return [
        (token, None, b"") if sampler.logprobs < 0 or token < 0 else with_logprobs(row, token, sampler.logprobs)
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
