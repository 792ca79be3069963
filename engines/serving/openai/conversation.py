"""A chat's messages as the prompt that the model's template makes of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.serving.openai.bodies import ChatBody
from deepseek_trt.engines.serving.openai.errors import invalid, unsupported
from deepseek_trt.engines.serving.openai.guides import forced_call, guide_of
from deepseek_trt.engines.serving.openai.served import Served
from deepseek_trt.engines.serving.openai.tool_use import ToolUse
from deepseek_trt.engines.text.messages import checked_arguments
from deepseek_trt.engines.text.parsing.choose import Formats
from deepseek_trt.engines.text.parsing.reasoning import CLOSE
from deepseek_trt.engines.text.parsing.said import Parser
from deepseek_trt.engines.text.parsing.tools import V31, ToolFormat
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.errors import RequestError

# What each role means to templates; they pass over roles that they do not know.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """The rendered prompt, its tokens, and how its answer is read."""

    prompt: str
    ids: list[int]
    use: ToolUse
    formats: Formats
    text: Text

    def guide(self, body: ChatBody) -> Guide | None:
        """What the request wants of the answer's form, from the end of its reasoning on."""
        guide = guide_of(body, body.response_format)
        if self.use.forced:
            if guide is not None:
                raise invalid("tool_choice: a call has a form already; leave response_format out", "tool_choice")
            guide = forced_call(self.use, self.tool_format, self.text.token_id)
        if guide is not None and self.formats.thinks_first(self.prompt):
            return dataclasses.replace(guide, after=CLOSE)
        return guide

    @property
    def tool_format(self) -> ToolFormat:
        """The model's own, or, as a forced call is one by its guide, any."""
        return self.formats.tools or V31

    @property
    def marks(self) -> frozenset[str]:
        """Special tokens that its answer's parser looks for."""
        return self._read.marks(self.use.tools is not None)

    def parser(self) -> Parser:
        """A new one, for one answer."""
        return self._read.parser(self.prompt, self.use.tools is not None)

    @property
    def _read(self) -> Formats:
        """The formats that its answer can have."""
        return dataclasses.replace(self.formats, tools=self.tool_format) if self.use.forced else self.formats


def converse(served: Served, body: ChatBody, use: ToolUse) -> Conversation:
    """Render and encode. Raises ApiError and RequestError; templates may take seconds."""
    assert served.text is not None
    arguments = _arguments(body)
    messages = [_message(index, message) for index, message in enumerate(body.messages)]
    _check_read(served, arguments, use)
    prompt = served.text.chat.render(messages, use.tools, None, arguments)
    return Conversation(prompt, served.text.encode_rendered(prompt), use, served.formats, served.text)


def _arguments(body: ChatBody) -> dict[str, Any]:
    """What the template gets beside messages and tools."""
    given = dict(body.chat_template_kwargs or {})
    if body.documents is not None:
        given["documents"] = body.documents
    try:
        return checked_arguments(given)
    except RequestError as error:
        raise invalid(f"chat_template_kwargs: {error}", "chat_template_kwargs") from None


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise invalid(
            f"messages[{index}]: role {str(role)[:80]!r} is none that is read; give one of {known}", "messages"
        )
    unknown = [key for key, value in message.items() if value and key not in _KEYS]
    if unknown:
        raise invalid(f"messages[{index}]: {unknown[0][:80]!r} is not read; leave it out", "messages")
    return {**{key: value for key, value in message.items() if key in _KEYS}, "role": _ROLES[role]}


def _check_read(served: Served, arguments: dict[str, Any], use: ToolUse) -> None:
    """What is given must reach the model."""
    assert served.text is not None
    tools = None if use.forced else use.tools
    for name in served.text.chat.unused(arguments, tools):
        if name == "tools":
            raise unsupported("tools", "this model's chat template does not read them; leave them out")
        param = "documents" if name == "documents" else "chat_template_kwargs"
        raise unsupported(param, f"this model's chat template does not read {name[:80]!r}; leave it out")
    if tools is not None and served.formats.tools is None:
        raise unsupported("tools", "how this model calls tools is not known; start the server with --tool-parser")
