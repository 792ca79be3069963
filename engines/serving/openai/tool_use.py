"""tools and tool_choice of a chat: checked, and what they want of the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from deepseek_trt.engines.serving.openai.bodies import ChatBody
from deepseek_trt.engines.serving.openai.errors import invalid

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class ToolUse:
    """tools: what the template gets, None for none. forced: the names of which one must be called, or empty."""

    tools: list[dict[str, Any]] | None = None
    forced: tuple[str, ...] = ()
    named: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, body: ChatBody) -> ToolUse:
        """Raises ApiError for tools and choices that are none."""
        tools, choice = body.tools or None, body.tool_choice
        names = [_name_of(index, tool) for index, tool in enumerate(tools or ())]
        if len(set(names)) < len(names):
            raise invalid(f"tools: two have one name, {max(names, key=names.count)!r}", "tools")
        if isinstance(choice, dict):
            chosen = _chosen(choice)
            if chosen not in names:
                raise invalid(
                    f"tool_choice: there is no tool {chosen!r}; tools has {', '.join(names) or 'none'}", "tool_choice"
                )
            return cls(tools, (chosen,), True, False)
        if choice not in (None, "none", "auto", "required"):
            raise invalid(f"tool_choice {choice!r}: must be none, auto, required, or a function's name", "tool_choice")
        if choice == "required" and not tools:
            raise invalid("tool_choice required: there are no tools to call; give tools", "tool_choice")
        parallel = body.parallel_tool_calls is not False
        if tools is None or choice == "none":
            return cls()
        return cls(tools, tuple(names) if choice == "required" else (), False, parallel)


def _name_of(index: int, tool: dict[str, Any]) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        wanted = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise invalid(f"tools[{index}]: is no function; give {wanted}", "tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"tools[{index}]: name {str(name)[:80]!r}: give 1 to 64 letters, digits, _ or -", "tools")
    if not isinstance(function.get("parameters", {}), (dict, type(None))):
        raise invalid(f"tools[{index}]: parameters of {name} are no JSON schema: give an object", "tools")
    return name


def _chosen(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise invalid('tool_choice: give {"type": "function", "function": {"name": ...}}', "tool_choice")
    return name
