"""Chat templates: a conversation as the checkpoint's template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek_trt.export.errors import RequestError

Message = dict[str, str]  # role, content


def render_chat(tokenizer_config: dict[str, Any], messages: Sequence[Message]) -> str:
    """The conversation as the checkpoint's template writes it; templates run in jinja2's sandbox.

    Raises RequestError when there is no template, or when it refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = tokenizer_config.get("chat_template")
    if not template:
        raise RequestError("the checkpoint has no chat template: leave out --chat")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    tokens = {name: _token_text(tokenizer_config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        return environment.from_string(template).render(messages=list(messages), add_generation_prompt=True, **tokens)
    except TemplateError as error:
        raise RequestError(f"the chat template refuses these messages: {error}") from None


def _token_text(token: str | dict[str, Any] | None) -> str:
    """tokenizer_config.json holds a token as text or as an object with its content."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token or ""
