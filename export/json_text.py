"""JSON that every reader takes: it has no NaN and no infinities."""

from __future__ import annotations

import json
import math
from typing import Any


def plain_json(value: Any) -> Any:
    """Lists and dicts with string keys; nan and the infinities as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """The value as JSON, letters beyond ASCII as they are."""
    return json.dumps(plain_json(value), indent=indent, ensure_ascii=False, allow_nan=False)
