"""Read a request's tensors as a prompt and sampling parameters; RequestError where one of them is wrong."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.tensors import INPUTS
from deepseek_trt.engines.text.messages import check_depth, checked_arguments, checked_messages, checked_tools
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.json_file import unique_object
from deepseek_trt.export.text.valid import check_text, text_of_bytes

Tensors = Mapping[str, npt.NDArray[Any]]
_NO_DEFAULTS = SamplingDefaults()

# What tritonserver and its clients add to a request's parameters by themselves.
_OWN_PARAMETERS = ("id", "binary_data_output", "sequence_id", "sequence_start", "sequence_end")
_OWN_PREFIX = "triton_"
_ESCAPED = 6  # bytes of JSON that one character takes at most
_KINDS = {"TYPE_STRING": "OSU", "TYPE_INT32": "iu", "TYPE_UINT64": "iu", "TYPE_BOOL": "b", "TYPE_FP32": "f"}
_SAMPLING = ("top_k", "top_p", "min_p", "temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class GenerateRequest:
    """A request that can be run. echo: text that comes before the answer; timeout_ms: None for no deadline.

    tokens_alone: whoever asked makes text of the tokens, and looks for stop strings.
    """

    prompt_ids: list[int]
    params: SamplingParams
    stream: bool
    echo: str
    timeout_ms: int | None
    tokens_alone: bool = False


def parse_request(
    tensors: Tensors,
    parameters: Mapping[str, Any],
    text: Text,
    timeout_us: int = 0,
    defaults: SamplingDefaults = _NO_DEFAULTS,
) -> GenerateRequest:
    """Check the inputs and parameters; `timeout_us` is tritonserver's own time-out of the request, 0 for none.

    `defaults` are for what the request does not say of sampling.
    """
    unknown = sorted(set(parameters) - set(_OWN_PARAMETERS))
    unknown = [name for name in unknown if not name.startswith(_OWN_PREFIX)]
    if unknown:
        known = ", ".join(field.name for field in INPUTS)
        raise RequestError(
            f"parameter {', '.join(repr(name)[1:-1] for name in unknown)}: not known; the inputs are {known}"
        )
    _check_types(tensors)
    params, timeout_ms = _sampling(tensors, defaults), _timeout(tensors, timeout_us)  # before what takes longer
    ids = _prompt(tensors, text)
    return GenerateRequest(
        prompt_ids=ids,
        params=params,
        stream=bool(_scalar(tensors, "stream", False)),
        echo="" if _scalar(tensors, "exclude_input_in_output", True) else _echo(tensors, text, ids),
        timeout_ms=timeout_ms,
    )


def _check_types(tensors: Tensors) -> None:
    """Of the inputs that there are; tritonserver has looked at them, others may not have."""
    fields = {field.name: field for field in INPUTS}
    for name, array in tensors.items():
        if name not in fields or array.dtype.kind not in _KINDS[fields[name].data_type]:
            wanted = f"must be {fields[name].data_type}" if name in fields else "not known"
            raise RequestError(f"input {name} of {array.dtype}: {wanted}")


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
    return text.encode(prompt)


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
    try:
        value = json.loads(_string(tensors, name), object_pairs_hook=unique_object)
    except KeyError as twice:
        raise RequestError(f"{name} has the key {twice.args[0]} twice in one object: leave out one of them") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON ({error}): give it as a string that holds JSON") from None
    check_depth(value, name)
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON ({error}): give numbers that are finite") from None
    check_text(written, name)
    return value


def _sampling(tensors: Tensors, defaults: SamplingDefaults) -> SamplingParams:
    words = _strings(tensors, "bad_words")
    if words:
        raise RequestError(f"bad_words {str(words[:8])[:80]}: not supported; leave it out")
    numbers = {name: _scalar(tensors, name, None) for name in _SAMPLING if name in tensors}
    if "max_tokens" in tensors:
        numbers["max_new_tokens"] = _scalar(tensors, "max_tokens", None)
        if numbers["max_new_tokens"] < 1:
            raise RequestError(
                f"max_tokens {numbers['max_new_tokens']}: must be at least 1 (an int32: 2147483648 and more wrap)"
            )
    return defaults.params(
        min_tokens=_scalar(tensors, "min_tokens", 0),
        seed=_scalar(tensors, "seed", secrets.randbits(63)),
        stop=tuple(_strings(tensors, "stop_words")),
        stop_token_ids=tuple(_token_ids(tensors, "stop_token_ids")),
        logprobs=0 if _scalar(tensors, "return_log_probs", False) else None,
        **numbers,
    )


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
