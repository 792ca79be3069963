"""SamplingParams: how one request picks tokens. No numpy here: the command line takes its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from deepseek_trt.export.errors import RequestError


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
        _require(0 <= self.temperature < inf, "temperature", self.temperature, "must be finite and not negative")
        _require(self.top_k >= 0, "top_k", self.top_k, "must not be negative (0 keeps all)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        _require(self.seed >= 0, "seed", self.seed, "must not be negative")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie in [0, 1]")
        _require(0 < self.repetition_penalty < inf, "repetition_penalty", self.repetition_penalty, "must be above 0")
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


def _require(condition: bool, field: str, value: object, mend: str) -> None:
    if not condition:
        raise RequestError(f"{field} {value!r}: {mend}")
