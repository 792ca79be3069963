"""From a body's fields to SamplingParams."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.openai.bodies import Generating
from deepseek_trt.engines.serving.openai.errors import invalid

MOST_LOGPROBS = 20  # OpenAI's bound
_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
)
_SEEDS = 2**64


def sampling_params(
    body: Generating, defaults: SamplingDefaults, max_tokens: int, logprobs: int | None, guide: Guide | None
) -> SamplingParams:
    """The body's, and for the rest `defaults`; `max_tokens` counts where neither says how many.

    Raises ApiError and RequestError.
    """
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise invalid(f"logprobs {logprobs}: must lie between 0 and {MOST_LOGPROBS}", "logprobs")
    if body.timeout_ms is not None and body.timeout_ms < 1:
        raise invalid(f"timeout_ms {body.timeout_ms}: must be at least 1", "timeout_ms")
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    given.setdefault("seed", secrets.randbits(63))
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k  # vLLM's word for all
    known = dict(defaults.values)
    given["max_new_tokens"] = asked_tokens(body) or known.get("max_new_tokens") or max_tokens
    given["logit_bias"] = _biases(body.logit_bias or {})
    return defaults.params(**given, logprobs=logprobs, guide=guide)


def _biases(given: dict[str, float]) -> dict[int, float]:
    """JSON's keys are text; these are token ids."""
    wrong = [key for key in given if not (key.isascii() and key.isdigit() and len(key) < 20)]
    if wrong:
        raise invalid(f"logit_bias {wrong[0][:80]!r}: keys are token ids, in digits", "logit_bias")
    biases = {int(key): bias for key, bias in given.items()}
    if len(biases) < len(given):
        raise invalid("logit_bias: a token comes twice, written differently", "logit_bias")
    return biases


def asked_tokens(body: Generating) -> int | None:
    """max_tokens, by either of its names."""
    newer = getattr(body, "max_completion_tokens", None)
    for name, value in (("max_tokens", body.max_tokens), ("max_completion_tokens", newer)):
        if value is not None and value < 1:
            raise invalid(f"{name} {value}: must be at least 1", name)
    if None not in (body.max_tokens, newer) and body.max_tokens != newer:
        raise invalid(
            f"max_tokens {body.max_tokens} and max_completion_tokens {newer} are two names of one thing: give one",
            "max_completion_tokens",
        )
    return body.max_tokens if newer is None else newer


def seeds_of(params: SamplingParams, count: int) -> Iterator[SamplingParams]:
    """Yield params for `count` answers, which sample with seed, seed + 1 and so on."""
    for index in range(count):
        yield dataclasses.replace(params, seed=(params.seed + index) % _SEEDS)


def wire_params(params: SamplingParams) -> dict[str, Any]:
    """The fields as plain values, without stop: the server looks for stop strings."""
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    del values["stop"]
    values["max_new_tokens"] = int(params.max_new_tokens)
    values["guide"] = None if params.guide is None else dataclasses.astuple(params.guide)
    return values
