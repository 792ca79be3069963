"""Guide: what form a request's answer must have, as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.text.valid import check_text

Kind = Literal["json_schema", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("json_schema", "regex", "choice", "grammar")
LONGEST_GUIDE = 2**18  # characters


@dataclass(frozen=True)
class Guide:
    """text: a JSON schema, a regular expression, a JSON list of texts, or a grammar in Lark's form or llama.cpp's.

    after: the text of one token, such as </think>, up to which the answer is free; empty where it never is.
    """

    kind: Kind
    text: str
    after: str = ""

    def __post_init__(self) -> None:
        """Raises RequestError for what is no guide by its form; a compiler knows the rest."""
        if self.kind not in KINDS:
            raise RequestError(f"guide {str(self.kind)[:80]!r}: must be one of {', '.join(KINDS)}")
        if not isinstance(self.text, str) or not isinstance(self.after, str):
            raise RequestError(f"guide {self.kind}: give text")
        if len(self.text) > LONGEST_GUIDE:
            raise RequestError(f"guide {self.kind}: {len(self.text)} characters; give at most {LONGEST_GUIDE}")
        check_text(self.text, f"guide {self.kind}")

    @classmethod
    def json_object(cls) -> Guide:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: Any) -> Guide:
        """JSON that a schema, as plain values, allows."""
        try:
            return cls("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"guide json_schema: cannot be written as JSON ({error}): use JSON's types") from None

    @classmethod
    def choice(cls, texts: Any) -> Guide:
        """One of these texts."""
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) and one for one in texts):
            raise RequestError("guide choice: give a list of texts, none of them empty")
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))
