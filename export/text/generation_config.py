"""GenerationConfig: what generation_config.json says of how answers are sampled, and of where they end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_trt.export.text.files import GENERATION_CONFIG, read_object, wrong_value

Number = int | float

# Which of its values requests take as defaults: vLLM's list (its `--generation-config auto`).
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
_INTEGERS = ("top_k", "max_new_tokens")
_USED = (*_FLOATS, *_INTEGERS, "do_sample", "eos_token_id")
# What changes no text here: bookkeeping, what is computed how, what is returned, and what only beams look at.
_HARMLESS = (
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "use_mtp", "speculation_type"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "renormalize_logits", "remove_invalid_values"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("early_stopping", "length_penalty", "trust_remote_code"),
)
_MOST = 1e300  # of a number that a float can hold
# Values with which keys that nothing here honours change nothing; null, false, 0 and empty never do.
_NEUTRAL: Mapping[str, Number] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "max_length": 20,  # transformers' own default, which it does not apply
}


@dataclass(frozen=True)
class GenerationConfig:
    """The file, typed. eos_token_ids and do_sample are None where it does not say; sampling holds what it does say.

    not_honoured: "key value" of what would change answers and is not done.
    """

    eos_token_ids: tuple[int, ...] | None = None
    do_sample: bool | None = None
    sampling: tuple[tuple[str, Number], ...] = ()
    not_honoured: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> GenerationConfig:
        """Read the folder's file, if there is one. Raises ConfigError naming file and key for a wrong type."""
        path = folder / GENERATION_CONFIG
        raw = read_object(path)
        do_sample = raw.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise wrong_value(path, "do_sample", do_sample, "must be true or false")
        names = [name for name in (*_FLOATS, *_INTEGERS) if raw.get(name) is not None]
        return cls(
            eos_token_ids=_token_ids(path, raw.get("eos_token_id")),
            do_sample=do_sample,
            sampling=tuple((name, _number(path, name, raw[name])) for name in names),
            not_honoured=tuple(
                f"{_short(key)[1:-1]} {_short(value)}" for key, value in raw.items() if _changes(key, value)
            ),
        )


def _token_ids(path: Path, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise wrong_value(path, "eos_token_id", value, "must be a token id or a list of them")
    return tuple(ids)


def _number(path: Path, key: str, value: Any) -> Number:
    """Ranges are for whoever samples."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MOST < value < _MOST:
        raise wrong_value(path, key, value, "must be a number")
    if key in _INTEGERS and value != int(value):
        raise wrong_value(path, key, value, "must be a whole number")
    return int(value) if key in _INTEGERS else float(value)


def _changes(key: str, value: Any) -> bool:
    if key in _USED or key in _HARMLESS or key.startswith("_"):
        return False
    return bool(value) and value != _NEUTRAL.get(key)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
