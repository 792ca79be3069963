"""Sampling: from logits to the next token, one request's randomness independent of what else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_trt.engines.session import Floats
from deepseek_trt.export.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks tokens. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        _require(self.temperature >= 0, f"temperature {self.temperature}: must not be negative")
        _require(self.top_k >= 0, f"top_k {self.top_k}: must not be negative (0 keeps all)")
        _require(0 < self.top_p <= 1, f"top_p {self.top_p}: must lie in (0, 1]")
        _require(self.seed >= 0, f"seed {self.seed}: must not be negative")


class Sampler:
    """One request's sampler, with its own random stream."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)

    def pick(self, logits: Floats) -> int:
        """The next token for logits [vocab]; of equal logits greedy takes the lowest id."""
        params = self._params
        if params.temperature == 0.0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if params.top_k:
            order = order[: params.top_k]
        scaled = logits[order].astype(np.float64) / params.temperature
        weights = np.exp(scaled - scaled[0])
        cumulative = np.cumsum(weights / weights.sum())
        if params.top_p < 1.0:
            kept = int(np.searchsorted(cumulative, params.top_p)) + 1
            order, cumulative = order[:kept], cumulative[:kept]
        draw = self._random.random() * cumulative[-1]
        return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(order) - 1)])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)
