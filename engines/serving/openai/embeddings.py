"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from deepseek_trt.engines.serving.openai.bodies import EmbeddingBody
from deepseek_trt.engines.serving.openai.errors import failed, invalid
from deepseek_trt.engines.serving.openai.served import Served
from deepseek_trt.engines.serving.process.messages import Failed, Vectors

_MOST = 2048  # texts of one request, OpenAI's bound


async def embeddings(served: Served, body: EmbeddingBody) -> dict[str, Any]:
    """The whole answer. Raises ApiError and RequestError."""
    if body.encoding_format not in (None, "float", "base64"):
        raise invalid(f"encoding_format {body.encoding_format!r}: must be float or base64", "encoding_format")
    rows = await asyncio.to_thread(_rows, served, body.input)
    async with served.engine.embed(rows) as asked:
        answer = await asked.next()
    if isinstance(answer, Failed):
        raise failed(answer)
    assert isinstance(answer, Vectors)
    tokens = sum(map(len, rows))
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(row, body.encoding_format)}
        for index, row in enumerate(answer.rows)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model or served.names[0], "usage": used}


def _vector(row: bytes, form: str | None) -> str | list[float]:
    """As JSON's numbers, or the bytes of little-endian float32."""
    if form == "base64":
        return base64.b64encode(row).decode()
    return list(memoryview(row).cast("f"))


def _rows(served: Served, given: str | list[Any]) -> list[list[int]]:
    """The tokens of one text or several."""
    several = given if isinstance(given, list) else [given]
    if several and all(isinstance(token, int) for token in several):
        several = [several]
    if not several or not all(several):
        raise invalid("input: is empty, or holds an empty text; give text, or token ids", "input")
    if len(several) > _MOST:
        raise invalid(f"input: {len(several)} texts; give at most {_MOST}", "input")
    if len({type(one) for one in several}) > 1 or isinstance(several[0], int):
        raise invalid("input: holds texts and tokens together; give a list of the one or the other", "input")
    return [_row(served, one) for one in several]


def _row(served: Served, one: str | list[int]) -> list[int]:
    if not isinstance(one, str):
        return one
    if served.text is None:
        raise invalid("input: the bundle has no tokenizer.json; give token ids", "input")
    return served.text.encode_prompt(one)
