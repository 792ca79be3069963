"""A conversation as chat APIs give it: checked, and in the forms that templates may want of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepseek_trt.export.errors import RequestError

Message = dict[str, Any]  # role, content, and what else the template reads: name, tool_calls, tool_call_id, ...
Messages = list[Message]
# Names under which a message's reasoning is sent; templates read the first (transformers' rule).
_DEEPEST = 64  # lists and objects in one another
_REASONING = ("reasoning_content", "thinking", "reasoning")


def checked_messages(given: Any) -> Messages:
    """A copy of plain JSON values; parts of text that are mere strings become {"type": "text", "text": ...}.

    Raises RequestError for what is no conversation, and for parts that are not text.
    """
    messages = _plain(given, "messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages {_short(given)}: give a list of at least one {{role, content}}")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    return [_with_reasoning(message) for message in messages]


def checked_tools(given: Any) -> list[dict[str, Any]] | None:
    """Tools as chat APIs give them: a list of objects; None for none."""
    tools = _plain(given, "tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError(f'tools {_short(given)}: give a list of objects, [{{"type": "function", "function": ...}}]')
    return tools


def checked_arguments(given: Any) -> dict[str, Any]:
    """What a template gets beside messages and tools; RequestError for names that have another way in."""
    arguments = _plain(given, "template arguments")
    if not isinstance(arguments, dict):
        raise RequestError(f'template arguments {_short(given)}: give an object, {{"name": value}}')
    taken = [name for name in ("messages", "tools", "chat_template", "continue_final_message") if name in arguments]
    if taken:
        raise RequestError(f"template argument {taken[0]!r}: not one that can be set")
    documents = arguments.get("documents")
    if documents is not None and not (isinstance(documents, list) and all(isinstance(d, dict) for d in documents)):
        raise RequestError(f"template argument 'documents' {_short(documents)}: give a list of objects")
    return arguments


def with_nulls(messages: Messages, none_tested: frozenset[str]) -> Messages:
    """Leave out what is null, as most templates would print it as "None" (transformers' rule).

    Not for templates that ask whether it is none: DeepSeek's know by it that an assistant's message is a call of
    tools alone. They get null where such a message has no content, too.
    """
    asked = "content" in none_tested
    completed = [
        {**({"content": None} if asked and message.get("tool_calls") else {}), **message} for message in messages
    ]
    return [{k: v for k, v in message.items() if v is not None or k in none_tested} for message in completed]


def has_parts(messages: Messages) -> bool:
    """Whether a content is a list."""
    return any(isinstance(message.get("content"), list) for message in messages)


def with_joined_parts(messages: Messages) -> Messages:
    """For templates that know text alone: parts become lines of one text (vLLM's rule)."""

    def joined(content: Any) -> Any:
        return "\n".join(part["text"] for part in content) if isinstance(content, list) else content

    return [{**m, "content": joined(m["content"])} if "content" in m else m for m in messages]


def with_marked_parts(messages: Messages, mark: str) -> Messages:
    """The same parts, each with `mark` as its text."""

    def marked(content: Any) -> Any:
        return [{**part, "text": mark} for part in content] if isinstance(content, list) else content

    return [{**m, "content": marked(m["content"])} if "content" in m else m for m in messages]


def with_other_arguments(messages: Messages) -> Messages | None:
    """Arguments of tool calls as JSON text where they are objects, and as objects where they are such text.

    Chat APIs send text, templates want the one or the other. None where there are no such arguments.
    """
    calls = [arguments for message in messages for arguments in _arguments(message)]
    if any(isinstance(arguments, dict) for arguments in calls):
        return _with_arguments(messages, lambda a: json.dumps(a, ensure_ascii=False) if isinstance(a, dict) else a)
    if not calls:
        return None
    try:
        return _with_arguments(messages, lambda a: json.loads(a) if isinstance(a, str) else a)
    except ValueError:
        return None


def _plain(given: Any, name: str) -> Any:
    """A copy that holds nothing but what JSON has, so that a template gets no object with methods of its own."""
    check_depth(given, name)
    try:
        return json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} cannot be written as JSON ({error}): use JSON's types") from None


def check_depth(given: Any, name: str) -> None:
    """RequestError for lists and objects that are nested deeper than anything that a template reads."""
    level = [given] if isinstance(given, (dict, list, tuple)) else []
    for _ in range(_DEEPEST + 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list, tuple))]
    if level:
        raise RequestError(f"{name}: nested more than {_DEEPEST} deep")


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{place} {_short(message)} has no role that is a string: give {{role, content}}")
    content = message.get("content")
    if content is None:
        others = [key for key, value in message.items() if value and key not in ("role", "content", "name")]
        if not others:
            raise RequestError(f"{place} ({repr(message['role'][:80])[1:-1]}) has no content: give text")
    elif isinstance(content, list):
        message["content"] = [_part(f"{place} content[{i}]", part) for i, part in enumerate(content)] or ""
    elif not isinstance(content, str):
        raise RequestError(f"{place} content {_short(content)}: give role and content as strings, or a list of parts")


def _part(place: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RequestError(f"{place} {_short(part)} is of type {kind!r}: the model reads text parts alone")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{place} {_short(part)} has no text that is a string")
    return dict(part)


def _with_reasoning(message: Message) -> Message:
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _functions(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the objects that hold a tool call's arguments: the call itself, or its "function"."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            function = call.get("function", call)
            if isinstance(function, dict):
                yield function


def _arguments(message: Message) -> Sequence[Any]:
    found = (function.get("arguments") for function in _functions(message))
    return [arguments for arguments in found if isinstance(arguments, (str, dict))]


def _with_arguments(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    copies: Messages = json.loads(json.dumps(messages))
    for message in copies:
        for function in _functions(message):
            if isinstance(function.get("arguments"), (str, dict)):
                function["arguments"] = change(function["arguments"])
    return copies


def _short(value: Any) -> str:
    if isinstance(value, (str, list)):
        value = value[:80]
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
