"""SamplingParams: how one request picks tokens. No numpy here: the command line takes its options from it."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from math import inf
from numbers import Integral, Real
from typing import Any

from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.text.valid import check_text

# Every stop string is looked for after every token: bounds for what a server's clients send.
MOST_STOPS = 128
LONGEST_STOP = 1024  # characters
MOST_BIAS = 100  # OpenAI's bound
MOST_BIASES = 1024  # tokens
_MOST = 2**31 - 1  # what the sampler counts to
_SEEDS = 2**64
_LARGEST_PENALTY = 1e6  # float32 logits stay finite by it
_BELOW = " and below 2^31"
_LENGTHS = f"must be at least 1{_BELOW}"
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_STOPS = f"must hold strings alone: at most {MOST_STOPS} strings, of at most {LONGEST_STOP} characters each"
_SHOWN = 120  # characters of a wrong value
_TUPLES = {"stop": "strings", "stop_token_ids": "token ids"}


class _Unset(int):
    """A default that nobody gave: equal to the number, and known as a default still in a copy with other fields."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks tokens, and when it ends.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token. They apply in this order: penalties,
    temperature, top_k, top_p of what is left, min_p as a share of the likeliest token's probability.
    repetition_penalty divides positive and multiplies negative logits of tokens in prompt or answer (arXiv:1909.05858);
    presence_penalty is subtracted once, frequency_penalty once an occurrence, from tokens in the answer.
    stop is one string or several: they are looked for in the text with special tokens written out, and are left out of
    it; stop tokens end the answer beside the model's own, which ignore_eos ignores. max_tokens, the name that servers
    give it, is another for max_new_tokens.
    Before min_tokens no stop counts. logprobs: None for none, n for the chosen token's and the n likeliest tokens'
    natural log-probabilities, of the model's own distribution: before penalties and temperature.
    logit_bias: (token id, what is added to its logit after the penalties), or a dict of them. guide: the form that the
    answer must have; it ends where the form does, and before min_tokens where nothing else may come.
    """

    max_new_tokens: int = _Unset(128)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    guide: Guide | None = None
    max_tokens: InitVar[int | None] = None

    def __post_init__(self, max_tokens: int | None) -> None:
        """Raises RequestError naming the field, its value and what it must be."""
        if max_tokens is not None:
            alone = isinstance(self.max_new_tokens, _Unset) or _same(self.max_new_tokens, max_tokens)
            _require(_is_whole(max_tokens), "max_tokens", max_tokens, "must be a whole number")
            _require(alone, "max_tokens", max_tokens, "is max_new_tokens, which is given, too: leave out one of them")
            object.__setattr__(self, "max_new_tokens", max_tokens)
        self._check_types()
        _require(1 <= self.max_new_tokens <= _MOST, "max_new_tokens", self.max_new_tokens, _LENGTHS)
        _require(0 <= self.temperature < inf, "temperature", self.temperature, "must be finite and not negative")
        _require(self.top_k >= 0, "top_k", self.top_k, "must not be negative (0 keeps all)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        _require(0 <= self.seed < _SEEDS, "seed", self.seed, "must not be negative, and below 2^64")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie in [0, 1]")
        bounded = 1 / _LARGEST_PENALTY <= self.repetition_penalty <= _LARGEST_PENALTY
        _require(bounded, "repetition_penalty", self.repetition_penalty, "must be above 0: in [1e-6, 1e6]")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "must lie in [-2, 2]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "must lie in [-2, 2]")
        self._check_stops()
        self._check_bias()
        _require(self.guide is None or isinstance(self.guide, Guide), "guide", self.guide, "must be a Guide or None")
        _require(0 <= self.min_tokens <= self.max_new_tokens, "min_tokens", self.min_tokens, self._min_tokens_range())
        fits = self.logprobs is None or 0 <= self.logprobs <= _MOST
        _require(fits, "logprobs", self.logprobs, f"must be None or not negative{_BELOW}")

    def _check_types(self) -> None:
        """Numbers of numpy become Python's, lists of stops and one string tuples; others have their field's type."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, value in vars(self).items():
            if name in _TUPLES:
                _require(isinstance(value, (tuple, list)), name, value, f"must be a tuple of {_TUPLES[name]}")
                object.__setattr__(self, name, tuple(value))
            elif name in _NUMBERS:
                number = isinstance(value, Real) and not isinstance(value, bool)
                huge = isinstance(value, int) and abs(value) > _MOST
                _require(number and not huge, name, value, "must be a number")
                object.__setattr__(self, name, value if isinstance(value, int) else _as_float(name, value))
            elif name == "ignore_eos":
                _require(isinstance(value, bool), name, value, "must be True or False")
            elif name not in ("logit_bias", "guide") and (name != "logprobs" or value is not None):
                _require(_is_whole(value), name, value, "must be a whole number")
                object.__setattr__(self, name, value if isinstance(value, _Unset) else int(value))

    def _check_bias(self) -> None:
        given = self.logit_bias
        held = isinstance(given, (dict, tuple, list))
        _require(held, "logit_bias", given, "must be a dict or a tuple of pairs")
        pairs = tuple(given.items() if isinstance(given, dict) else given)
        mend = f"must hold token ids, each once, with numbers in [-{MOST_BIAS}, {MOST_BIAS}]"
        good = all(isinstance(p, (tuple, list)) and len(p) == 2 and _is_bias(*p) for p in pairs)
        _require(good and len({p[0] for p in pairs}) == len(pairs) <= MOST_BIASES, "logit_bias", self.logit_bias, mend)
        object.__setattr__(self, "logit_bias", tuple((int(token), float(bias)) for token, bias in pairs))

    def _check_stops(self) -> None:
        few = len(self.stop) <= MOST_STOPS
        _require(few and all(isinstance(text, str) for text in self.stop), "stop", self.stop, _STOPS)
        _require(all(len(text) <= LONGEST_STOP for text in self.stop), "stop", self.stop, _STOPS)
        for text in self.stop:
            check_text(text, f"stop {text!r}")
        _require(all(self.stop), "stop", self.stop, "must hold no empty string")
        _require(all(map(_is_whole, self.stop_token_ids)), "stop_token_ids", self.stop_token_ids, "must hold token ids")
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        lowest = min(self.stop_token_ids, default=0)
        _require(lowest >= 0, "stop_token_ids", self.stop_token_ids, "must not be negative")

    def _min_tokens_range(self) -> str:
        return f"must lie between 0 and max_new_tokens, {self.max_new_tokens}"

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _is_bias(token: object, bias: object) -> bool:
    number = isinstance(bias, Real) and not isinstance(bias, bool) and _is_moderate(bias)
    return isinstance(token, Integral) and _is_whole(token) and 0 <= int(token) <= _MOST and number


def _is_moderate(number: Any) -> bool:
    return bool(-MOST_BIAS <= number <= MOST_BIAS)  # whole numbers of any length: no float is made of them


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _same(one: object, other: object) -> bool:
    return _is_whole(one) and _is_whole(other) and one == other


def _as_float(name: str, value: Real) -> float:
    try:
        return float(value)
    except (OverflowError, ValueError):
        raise RequestError(f"{name} is beyond what a float holds: must be a number") from None


def _require(condition: bool, field: str, value: object, mend: str) -> None:
    if not condition:
        raise RequestError(f"{field} {_short(value)}: {mend}")


def _short(value: object) -> str:
    """At most _SHOWN characters; long lists and numbers are not written out first."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"(a number of {value.bit_length()} bits)"
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > _SHOWN:
        return f"{_short(value[: _SHOWN // 4])[:-1]}... ({len(value)} in all)"
    try:
        shown = repr(value)
    except Exception:  # the value's own, or a number of too many digits inside
        shown = f"(a {type(value).__name__})"
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
