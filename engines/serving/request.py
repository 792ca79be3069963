"""Read a request's tensors as a prompt and sampling parameters; RequestError where one of them is wrong."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.names.guides import GUIDE, TYPE, after_thinking, guide_of
from deepseek_trt.engines.serving.names.json_input import json_of
from deepseek_trt.engines.serving.names.reading import ModelIds, Tensors, own_tensors
from deepseek_trt.engines.text.messages import checked_arguments, checked_messages, checked_tools
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.text.valid import check_text, text_of_bytes

_NO_DEFAULTS = SamplingDefaults()
_NO_IDS = ModelIds()
_ESCAPED = 6  # bytes of JSON that one character takes at most
_RETURNED = ("finish_reason", "num_input_tokens", "num_output_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class GenerateRequest:
    """A request that can be run. echo: text that comes before the answer; timeout_ms: None for no deadline.

    tokens_alone: whoever asked makes text of the tokens, and looks for stop strings. unwanted: outputs to leave out.
    """

    prompt_ids: list[int]
    params: SamplingParams
    stream: bool
    echo: str
    timeout_ms: int | None
    tokens_alone: bool = False
    unwanted: frozenset[str] = frozenset()


def parse_request(
    tensors: Tensors,
    parameters: Mapping[str, Any],
    text: Text,
    timeout_us: int = 0,
    defaults: SamplingDefaults = _NO_DEFAULTS,
    ids: ModelIds = _NO_IDS,
) -> GenerateRequest:
    """Check the inputs and parameters; `timeout_us` is tritonserver's own time-out of the request, 0 for none.

    `defaults` are for what the request does not say of sampling; `ids` are the model's.
    """
    given = own_tensors(tensors, parameters, ids)
    params, timeout_ms = _sampling(given, defaults), _timeout(given, timeout_us)  # before what takes longer
    prompt = _prompt(given, text)
    return GenerateRequest(
        prompt_ids=prompt,
        params=dataclasses.replace(params, guide=after_thinking(params.guide, text, prompt)),
        stream=bool(_scalar(given, "stream", False)),
        echo="" if _scalar(given, "exclude_input_in_output", True) else _echo(given, text, prompt),
        timeout_ms=timeout_ms,
        unwanted=_unwanted(given),
    )


def _unwanted(tensors: Tensors) -> frozenset[str]:
    """Outputs that the request does not ask for."""
    refused = {name for name in _RETURNED if not _scalar(tensors, f"return_{name}", True)}
    if not _scalar(tensors, "return_log_probs", False):
        refused |= {"output_log_probs", "cum_log_probs"}
    if not _scalar(tensors, "return_cumulative_logprob", False):
        refused.add("cumulative_logprob")
    return frozenset(refused)


def _echo(tensors: Tensors, text: Text, ids: list[int]) -> str:
    """The text that the prompt's tokens stand for."""
    return text.decode(ids) if "messages" in tensors else _string(tensors, "text_input")


def _prompt(tensors: Tensors, text: Text) -> list[int]:
    if ("text_input" in tensors) == ("messages" in tensors):
        raise RequestError("give either text_input or messages")
    if "messages" in tensors:
        return _chat_ids(tensors, text)
    alone = [name for name in ("tools", "chat_template_kwargs") if name in tensors]
    if alone:
        raise RequestError(f"{alone[0]} is for the chat template: give messages instead of text_input")
    _check_size(tensors, "text_input", text.most_bytes)
    prompt = _string(tensors, "text_input")
    if not prompt:
        raise RequestError("text_input is empty: give at least one character")
    return text.encode_prompt(prompt)


def _check_size(tensors: Tensors, name: str, most: int) -> None:
    """Before it is decoded or read: more bytes than all tokens that the model takes can stand for."""
    size = len(value) if name in tensors and isinstance(value := _one(tensors, name), (bytes, str)) else 0
    if size > most:
        raise RequestError(f"{name} has {size:,} bytes, more than the model has tokens for ({most:,}): shorten it")


def _chat_ids(tensors: Tensors, text: Text) -> list[int]:
    for name in ("messages", "tools", "chat_template_kwargs"):
        _check_size(tensors, name, _ESCAPED * text.most_bytes)
    messages = checked_messages(_json(tensors, "messages"))
    tools = checked_tools(_json(tensors, "tools"))
    arguments = checked_arguments(_json(tensors, "chat_template_kwargs") or {})
    return text.encode_chat(messages, tools, **arguments)


def _json(tensors: Tensors, name: str) -> Any:
    """The value of a tensor that holds JSON as a string; None where it is not sent."""
    if name not in tensors:
        return None
    return json_of(_string(tensors, name), name)


def _sampling(tensors: Tensors, defaults: SamplingDefaults) -> SamplingParams:
    words = _strings(tensors, "bad_words")
    if words:
        raise RequestError(f"bad_words {str(words[:8])[:80]}: not supported; use logit_bias, which has token ids")
    numbers = {name: _scalar(tensors, name, None) for name in _SAMPLING if name in tensors}
    if numbers.get("top_k") == -1:  # vLLM's word for all
        numbers["top_k"] = 0
    if "max_tokens" in tensors:
        numbers["max_new_tokens"] = _scalar(tensors, "max_tokens", None)
        if numbers["max_new_tokens"] < 1:
            raise RequestError(
                f"max_tokens {numbers['max_new_tokens']}: must be at least 1 (an int32: 2147483648 and more wrap)"
            )
    logprobs = any(_scalar(tensors, name, False) for name in ("return_log_probs", "return_cumulative_logprob"))
    return defaults.params(
        min_tokens=_scalar(tensors, "min_tokens", 0),
        seed=_scalar(tensors, "seed", secrets.randbits(63)),
        stop=tuple(_strings(tensors, "stop_words")),
        stop_token_ids=tuple(_token_ids(tensors, "stop_token_ids")),
        ignore_eos=_scalar(tensors, "ignore_eos", False),
        logprobs=0 if logprobs else None,
        logit_bias=_biases(_json(tensors, "logit_bias")),
        guide=guide_of(*(_string(tensors, name) if name in tensors else None for name in (TYPE, GUIDE))),
        **numbers,
    )


def _biases(given: Any) -> dict[int, float]:
    """JSON's keys are text; these are token ids."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RequestError("logit_bias holds no JSON object: give {token id: what is added}")
    wrong = next((key for key in given if not (key.isascii() and key.isdigit() and len(key) < 20)), None)
    if wrong is not None:
        raise RequestError(f"logit_bias {wrong[:80]!r}: keys are token ids, in digits")
    biases = {int(key): bias for key, bias in given.items()}
    if len(biases) < len(given):
        raise RequestError("logit_bias: a token comes twice, written differently")
    return biases


def _timeout(tensors: Tensors, timeout_us: int) -> int | None:
    """The shorter of timeout_ms and tritonserver's own, rounded up; None for no deadline."""
    given = _scalar(tensors, "timeout_ms", None)
    if given is not None and given < 1:
        raise RequestError(f"timeout_ms {given}: must be at least 1")
    limits = [limit for limit in (given, -(-timeout_us // 1000) or None) if limit is not None]
    return min(limits, default=None)


def _scalar(tensors: Tensors, name: str, default: Any) -> Any:
    """The one value as Python's; a float32 becomes the shortest number that rounds to it: 0.7 stays 0.7."""
    if name not in tensors:
        return default
    value = _one(tensors, name)
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def _string(tensors: Tensors, name: str) -> str:
    return _decoded(_one(tensors, name), name)


def _one(tensors: Tensors, name: str) -> Any:
    array = tensors[name]
    if array.size != 1:
        raise RequestError(f"{name} has shape {list(array.shape)}: give one value")
    return array.reshape(-1)[0]


def _strings(tensors: Tensors, name: str) -> list[str]:
    """All but empty ones, which TensorRT-LLM's clients send for none."""
    if name not in tensors:
        return []
    return [word for value in tensors[name].reshape(-1) if (word := _decoded(value, name))]


def _token_ids(tensors: Tensors, name: str) -> list[int]:
    if name not in tensors:
        return []
    ids: list[int] = tensors[name].reshape(-1).tolist()
    return ids


def _decoded(value: Any, name: str) -> str:
    return text_of_bytes(value, name) if isinstance(value, bytes) else check_text(str(value), name)
