"""Chat templates: a conversation as the checkpoint's template writes it."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deepseek_trt.engines.text.messages import (
    Messages,
    checked_arguments,
    checked_messages,
    checked_tools,
    has_parts,
    with_joined_parts,
    with_marked_parts,
    with_nulls,
    with_other_arguments,
)
from deepseek_trt.engines.text.template_files import (
    ChatTemplate,
    Named,
    choose_template,
    read_special_tokens,
    read_templates,
)
from deepseek_trt.export.errors import RequestError

if TYPE_CHECKING:
    from deepseek_trt.engines.text.environment import Compiled

T = TypeVar("T")

_MARK = "deepseek-trt-part"
_LONGEST_REASON = 300  # characters of what a template or Python says


class TemplateError(RequestError):
    """A template cannot be run, or refuses the form in which it was given the messages."""


class ChatTemplates:
    """The chat templates and special tokens of a folder; read when they are first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cached_property
    def named(self) -> Named:
        return read_templates(self._folder)

    @functools.cached_property
    def tokens(self) -> Mapping[str, str]:
        return read_special_tokens(self._folder)

    def render(
        self, messages: Any, tools: Any = None, name: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> str:
        """The conversation as text that ends where the answer begins.

        `name` is one of `named` or a file; `arguments` are names that the template reads (add_generation_prompt and
        documents may be among them). Raises RequestError.
        """
        template = choose_template(self.named, name, tools is not None)
        return render_chat(template, messages, tools, {**self.tokens, **checked_arguments(arguments or {})})

    def unused(self, arguments: Mapping[str, Any], tools: Any = None, name: str | None = None) -> list[str]:
        """Those of `arguments`, and of tools where they are given, that the template never reads."""
        template = choose_template(self.named, name, tools is not None)
        given = [*arguments, *(["tools"] if tools is not None else [])]
        return [one for one in given if one not in _compiled(template).variables]


def render_chat(
    template: ChatTemplate, messages: Any, tools: Any = None, values: Mapping[str, Any] | None = None
) -> str:
    """The conversation by this template, with `values` beside what every template gets.

    Where the template fails on arguments of tool calls as they are given, it gets them in their other form; where it
    knows no parts, it gets them as one text. Raises RequestError for messages that are none, and TemplateError.
    """
    compiled, tools = _compiled(template), checked_tools(tools)
    given = with_nulls(checked_messages(messages), compiled.none_tested)
    fixed = {"tools": tools, "documents": None, "add_generation_prompt": True, **(values or {})}

    def render(conversation: Messages) -> str:
        return _guarded(template, lambda: compiled.render({**fixed, "messages": conversation}))

    if has_parts(given) and _takes_parts(render, given):
        return _in_either_form(render, given)
    return _in_either_form(render, with_joined_parts(given))


def _in_either_form(render: Callable[[Messages], str], messages: Messages) -> str:
    try:
        return render(messages)
    except TemplateError:
        other = with_other_arguments(messages)
        if other is None:
            raise
        try:
            return render(other)
        except TemplateError:
            pass
        raise


def _takes_parts(render: Callable[[Messages], str], messages: Messages) -> bool:
    """Whether the template writes the text of all parts that it writes of the joined ones, and no list as it stands."""
    marked = with_marked_parts(messages, _MARK)
    try:
        parts = _in_either_form(render, marked)
    except TemplateError:
        return False
    try:
        joined = _in_either_form(render, with_joined_parts(marked))
    except TemplateError:
        return True
    return "{'type'" not in parts and parts.count(_MARK) == joined.count(_MARK)


def _compiled(template: ChatTemplate) -> Compiled:
    from deepseek_trt.engines.text.environment import compile_template

    return _guarded(template, lambda: compile_template(template.text, template.place))


def _guarded(template: ChatTemplate, run: Callable[[], T]) -> T:
    """What a template raises is its author's: any exception becomes one sentence with the template and its line.

    RequestError where it wants more than its limits, else TemplateError.
    """
    import jinja2

    from deepseek_trt.engines.text.limits import LimitError

    try:
        return run()
    except Exception as error:
        line = _line(error, template.place)
        place = template.place if line is None else f"{template.place}, line {line}"
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        if isinstance(error, LimitError):
            raise RequestError(f"{place}: the chat template was stopped: {reason}") from None
        if not isinstance(error, jinja2.TemplateError):
            reason = f"{type(error).__name__}: {reason}"
        raise TemplateError(f"{place}: the chat template refuses these messages: {reason}") from None


def _line(error: Exception, place: str) -> int | None:
    """The innermost line of the template; jinja2 puts its lines into the traceback."""
    own = getattr(error, "lineno", None)  # of a TemplateSyntaxError
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == place]
    return own if isinstance(own, int) else next(reversed(lines), None)
