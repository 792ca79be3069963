"""The form that a request wants of its answer, by any of the names that OpenAI and vLLM have for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.generation.guiding import JSON_OPTIONS
from deepseek_trt.engines.serving.openai.bodies import Generating, ResponseFormat
from deepseek_trt.engines.serving.openai.errors import ApiError, invalid
from deepseek_trt.engines.serving.openai.tool_use import ToolUse
from deepseek_trt.engines.text.parsing.tools import CALLS_BEGIN, CALLS_END, MARKS, ToolFormat
from deepseek_trt.export.errors import RequestError

_MARKS = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")


def _schema(value: Any) -> Guide:
    """A schema as an object, or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema is not JSON ({error})") from None
    if not isinstance(value, (dict, bool)):
        raise RequestError("the schema must be an object")
    return Guide.json_schema(value)


def _object(value: Any) -> Guide | None:
    if not isinstance(value, bool):
        raise RequestError("must be true or false")
    return Guide.json_object() if value else None


def _text_of(kind: Any) -> Callable[[Any], Guide]:
    def made(value: Any) -> Guide:
        if not isinstance(value, str) or not value:
            raise RequestError("must be a text that is not empty")
        return Guide(kind, value)

    return made


_MAKERS: dict[str, Callable[[Any], Guide | None]] = {
    "json": _schema,
    "json_object": _object,
    "regex": _text_of("regex"),
    "choice": Guide.choice,
    "grammar": _text_of("grammar"),
}


def guide_of(body: Generating, response_format: ResponseFormat | None) -> Guide | None:
    """The one form that is asked for, or None. ApiError for several, and for what is none."""
    asked = _asked(body, response_format)
    if len(asked) > 1:
        names = ", ".join(param for param, _, _ in asked)
        raise invalid(f"{asked[0][0]}: an answer has one form, and {names} ask for several; give one", asked[0][0])
    for param, kind, value in asked:
        try:
            return _MAKERS[kind](value)
        except RequestError as error:
            raise invalid(f"{param}: {error}", param) from None
    return None


@contextmanager
def naming_guide(param: str | None) -> Iterator[None]:
    """What the engine says of a guide is said of the field that asked for it."""
    try:
        yield
    except ApiError as error:
        if error.param == "guide" and param:
            raise ApiError(error.status, str(error).replace("guide", param, 1), param, error.code) from None
        raise


def asking_param(body: Generating, response_format: ResponseFormat | None) -> str | None:
    """The field that asks for a form."""
    return next((param for param, _, _ in _asked(body, response_format)), None)


def _asked(body: Generating, response_format: ResponseFormat | None) -> list[tuple[str, str, Any]]:
    """Fields that ask for a form, its kind, and what they give."""
    asked: list[tuple[str, str, Any]] = [
        (f"guided_{kind}", kind, value)
        for kind in ("json", "regex", "choice", "grammar")
        if (value := getattr(body, f"guided_{kind}")) is not None
    ]
    for kind, value in (body.structured_outputs or {}).items():
        if kind not in _MAKERS:
            known = ", ".join(_MAKERS)
            raise invalid(f"structured_outputs: {kind[:80]!r} is none of {known}", "structured_outputs")
        if value is not None:
            asked.append(("structured_outputs", kind, value))
    if response_format is not None:
        asked += _of_format(response_format)
    return asked


def _of_format(response_format: ResponseFormat) -> list[tuple[str, str, Any]]:
    kind, given = response_format.type, response_format.json_schema
    if kind == "json_schema":
        if given is None or "schema" not in given:
            wanted = '{"type": "json_schema", "json_schema": {"schema": ...}}'
            raise invalid(f"response_format: give {wanted}", "response_format")
        unknown = given.keys() - {"name", "description", "schema", "strict"}
        if unknown:
            shown = f"json_schema holds {min(unknown)[:80]!r}, which is not known"
            raise invalid(f"response_format: {shown}", "response_format")
        return [("response_format", "json", given["schema"])]
    if given is not None or kind not in ("text", "json_object"):
        wanted = "text, json_object, or json_schema with a json_schema"
        raise invalid(f"response_format: type {kind[:80]!r}: must be {wanted}", "response_format")
    return [("response_format", "json_object", True)] if kind == "json_object" else []


def forced_call(use: ToolUse, form: ToolFormat, token_id: Callable[[str], int | None]) -> Guide:
    """Calls of the forced tools, with arguments by their schemas: one, or as many as may be in parallel.

    `token_id` knows those of the format's marks that are tokens: a grammar names these by their ids.
    """

    def mark(text: str) -> str:
        ids = {part: token_id(part) for part in _MARKS.split(text) if part}
        return " ".join(json.dumps(part, ensure_ascii=False) if id is None else f"<[{id}]>" for part, id in ids.items())

    calls = "call+" if use.parallel else "call"
    named = {tool["function"]["name"]: tool["function"].get("parameters") for tool in use.tools or ()}
    lines = [f"start: {mark(CALLS_BEGIN)} {calls} {mark(CALLS_END)}"]
    lines.append("call: " + " | ".join(f"call{index}" for index in range(len(use.forced))))
    for index, name in enumerate(use.forced):
        around = [mark(form.before), json.dumps(name), mark(form.between), f"arguments{index}", mark(form.after)]
        lines.append(f"call{index}: {' '.join(around)}")
        lines.append(f"arguments{index}: %json {json.dumps(_strict(named[name]))}")
    return Guide("grammar", "\n".join(lines))


def _strict(schema: Any) -> Any:
    """The schema, or any object; white space bounded as everywhere."""
    return {**(schema or {"type": "object"}), "x-guidance": JSON_OPTIONS}
