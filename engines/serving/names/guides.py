"""The form that a request wants of its answer: TensorRT-LLM's two inputs, and vLLM's objects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.serving.names.json_input import json_of
from deepseek_trt.engines.text.parsing.reasoning import CLOSE, OPEN
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import RequestError

TYPE, GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
_TYPES = ("json", "json_schema", "regex", "choice", "ebnf_grammar", "grammar")
# vLLM's keys, and the type that each asks for.
_ASKING = {"json": "json_schema", "json_object": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
# How vLLM makes masks, which changes no mask.
_HARMLESS = ("backend", "_backend", "backend_was_auto", "_backend_was_auto", "disable_fallback")


def guide_of(kind: str | None, text: str | None) -> Guide | None:
    """The guide of the two inputs; None where neither is given, or both are empty."""
    if not kind and not text:
        return None
    if kind == "json" and not text:
        return Guide.json_object()
    if kind not in _TYPES:
        raise RequestError(f"{TYPE} {(kind or '')[:80]!r}: must be one of {', '.join(_TYPES)}")
    if not text:
        raise RequestError(f"{GUIDE} is missing, or empty: give the {kind}")
    if kind in ("json", "json_schema"):
        return _schema(text)
    if kind == "choice":
        return Guide.choice(json_of(text, GUIDE))
    return Guide("regex" if kind == "regex" else "grammar", text)


def _schema(text: str) -> Guide:
    value = json_of(text, GUIDE)
    if not isinstance(value, (dict, bool)):
        raise RequestError(f"{GUIDE} must hold a schema, a JSON object: {text[:80]!r}")
    return Guide.json_schema(value)


def after_thinking(guide: Guide | None, text: Text, prompt_ids: Sequence[int]) -> Guide | None:
    """The guide from the end of the reasoning on, where the prompt has opened it."""
    if guide is None:
        return None
    opened, closed = text.token_id(OPEN), text.token_id(CLOSE)
    if opened is None or closed is None:
        return guide
    spaced = len(prompt_ids) > 1 and text.decode(prompt_ids[-1:]).isspace()
    last = prompt_ids[-2] if spaced else prompt_ids[-1]
    return dataclasses.replace(guide, after=CLOSE) if last == opened else guide


def tensors_of_guide(name: str, value: Any) -> dict[str, str]:
    """An object of vLLM's, or its JSON, as values of the two inputs; RequestError for several forms, unknown keys."""
    given = json_of(value, name) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise RequestError(f"{name} must be an object, such as {{'regex': ...}}")
    said = {key: each for key, each in given.items() if each is not None and each is not False}
    unknown = next((key for key in said if key not in _ASKING and key not in _HARMLESS), None)
    if unknown is not None:
        raise RequestError(f"{name}: {str(unknown)[:80]!r} is not supported; known are {', '.join(_ASKING)}")
    forms = [key for key in said if key in _ASKING]
    if len(forms) > 1:
        raise RequestError(f"{name}: an answer has one form, and {', '.join(forms)} ask for several; give one")
    if not forms:
        return {}
    kind, form = _ASKING[forms[0]], said[forms[0]]
    if kind == "json":
        return {TYPE: kind}
    return {TYPE: kind, GUIDE: form if isinstance(form, str) else json.dumps(form, ensure_ascii=False)}
