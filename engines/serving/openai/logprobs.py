"""Log-probabilities in the forms of the two APIs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from deepseek_trt.engines.generation.answer import Piece

_LEAST = -9999.0  # JSON has no infinity
BytesOf = Callable[[int], bytes]


def chat_logprobs(pieces: Iterable[Piece], bytes_of: BytesOf) -> dict[str, Any]:
    """Of chat/completions: a list of tokens, each with its bytes and the likeliest."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    content = [
        {
            **entry(piece.token_id, piece.logprob or 0.0),
            "top_logprobs": [entry(token, logprob) for token, logprob in piece.top_logprobs],
        }
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of completions: parallel lists; offsets go on from one delta to the next."""

    def __init__(self, bytes_of: BytesOf, count: int, start: int) -> None:
        """`count` likeliest tokens each; `start`: characters before the answer, those of an echo."""
        self._bytes_of, self._count, self._offset = bytes_of, count, start

    def of(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        tokens, logprobs, tops, offsets = [], [], [], []
        for piece in pieces:
            tokens.append(self._name(piece.token_id))
            logprobs.append(max(piece.logprob or 0.0, _LEAST))
            tops.append({self._name(token): max(logprob, _LEAST) for token, logprob in piece.top_logprobs})
            offsets.append(self._offset)
            self._offset += len(piece.text)
        top = tops if self._count else None
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _name(self, token: int) -> str:
        """The token's text, or its bytes where it holds a part of a character (OpenAI's way)."""
        data = self._bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
