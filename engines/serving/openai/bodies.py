"""Bodies of requests as JSON gives them; a field that is not here is refused by its name."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from deepseek_trt.engines.serving.openai.errors import ApiError, unsupported
from deepseek_trt.export.json_file import unique_object

B = TypeVar("B", bound="Body")

# Of fields that are taken for their neutral values alone, these; null is always one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True, False),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "functions": ([],),
    "function_call": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "dimensions": (),
}
_HINTS = {
    "functions": "give tools instead",
    "function_call": "give tool_choice instead",
    "suffix": "this model completes text at its end alone",
    "reasoning_effort": 'what the model\'s template reads goes into chat_template_kwargs, e.g. {"thinking": true}',
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Of OpenAI's, and vLLM's continuous_usage_stats."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of all. user, metadata and their like name who asks, and change no answer."""

    model: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Any = None
    service_tier: Any = None
    dimensions: Any = None


class Generating(Body, kw_only=True):
    """Fields of completions and chats; None is for the server's or the model's own default."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    # ours: the tritonserver model's name for a deadline
    timeout_ms: int | None = None
    # vLLM's, for neutral values
    length_penalty: Any = None
    use_beam_search: Any = None
    early_stopping: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    include_stop_str_in_output: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's; json_schema holds name, schema and strict."""

    type: str
    json_schema: dict[str, Any] | None = None


class CompletionBody(Generating, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    response_format: ResponseFormat | None = None
    suffix: Any = None
    add_special_tokens: bool | None = None


class ChatBody(Generating, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class EmbeddingBody(Body, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[str | int | list[int]]
    encoding_format: str | None = None


def read_body(kind: type[B], data: bytes) -> B:
    """The body as a `kind`. ApiError for what is no JSON, a wrong type, and a field unknown or not supported."""
    try:
        body = msgspec.json.decode(data, type=kind)
        json.loads(data, object_pairs_hook=unique_object)  # msgspec takes the last of two
    except KeyError as twice:
        raise ApiError(400, f"the key {twice.args[0]} comes twice in one object", None, "invalid_json") from None
    except msgspec.ValidationError as error:
        raise _mistyped(error) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", None, "invalid_json") from None
    for name, values in _NEUTRAL.items():
        given = getattr(body, name, None)
        if given is not None and not any(_same(given, value) for value in values):
            hint = _HINTS.get(name, "leave it out")
            raise unsupported(name, f"{_short(given)} is not supported; {hint}")
    return body


def _same(given: Any, value: Any) -> bool:
    return given == value and isinstance(given, bool) == isinstance(value, bool)


def _mistyped(error: msgspec.ValidationError) -> ApiError:
    """Of what msgspec says: "Expected `int`, got `str` - at `$.max_tokens`", or an unknown field's name."""
    sentence, _, place = str(error).partition(" - at `$")
    place = place.strip("`.")
    if "unknown field" in sentence or "missing required field" in sentence:
        param = sentence.rpartition(" ")[2].strip("`")
        unknown = "unknown" in sentence
        code = "unknown_parameter" if unknown else "missing_required_parameter"
        whole = f"{place}.{param}" if place else param
        said = "is not known here" if unknown else "is missing"
        return ApiError(400, f"{whole}: {said}", _first(whole), code)
    param = _first(place)
    return ApiError(400, f"{place or 'the body'}: {sentence}", param or None, "invalid_type")


def _first(place: str) -> str:
    """The field of the body that a place lies in."""
    return place.partition("[")[0].partition(".")[0]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
