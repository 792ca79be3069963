"""JSON that a request holds as text."""

from __future__ import annotations

import json
from typing import Any

from deepseek_trt.engines.text.messages import check_depth
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.json_file import unique_object
from deepseek_trt.export.text.valid import check_text


def json_of(text: str, name: str) -> Any:
    """The value; RequestError that calls it `name` for no JSON, a key twice, NaN, half a character and deep nesting."""
    try:
        value = json.loads(text, object_pairs_hook=unique_object)
    except KeyError as twice:
        raise RequestError(f"{name} has the key {twice.args[0]} twice in one object: leave out one of them") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON ({error}): give it as a string that holds JSON") from None
    check_depth(value, name)
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON ({error}): give numbers that are finite") from None
    check_text(written, name)
    return value
