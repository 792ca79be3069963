"""Served: what answers are made with: the bundle's text, the engine, and the names that requests call the model by."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.serving.openai.errors import ApiError, invalid
from deepseek_trt.engines.serving.process.client import EngineClient
from deepseek_trt.engines.text.parsing.choose import Formats
from deepseek_trt.engines.text.text import Text


@dataclass(frozen=True)
class Served:
    """max_choices: answers that one request may ask for, those that the engine takes at once."""

    names: tuple[str, ...]
    text: Text | None
    engine: EngineClient
    defaults: SamplingDefaults
    formats: Formats
    max_model_len: int
    max_choices: int
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> str:
        """The name to answer with; a request without one means the first."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            message = f"model {name[:80]!r} is not served here: it is called {known}"
            raise ApiError(404, message, "model", "model_not_found")
        return name or self.names[0]

    def check_choices(self, count: int, param: str) -> None:
        if not 1 <= count <= self.max_choices:
            raise invalid(f"{param}: {count} answers are asked for; give from 1 to {self.max_choices}", param)

    def head(self, kind: str, model: str, prefix: str) -> dict[str, Any]:
        """What every object of an answer begins with."""
        id = f"{prefix}-{secrets.token_hex(16)}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": model, "system_fingerprint": None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
