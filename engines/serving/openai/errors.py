"""ApiError: what goes wrong with a request, as OpenAI's clients know it."""

from __future__ import annotations

import re
from typing import Any

from deepseek_trt.engines.serving.process.messages import Failed
from deepseek_trt.export.errors import RequestError
from deepseek_trt.export.text.valid import printable

# OpenAI's "type" of each status that there is.
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_STATUS = {"invalid": 400, "timeout": 408, "failed": 500, "cancelled": 499}
_TOO_LONG = re.compile(r"has \d+ (tokens|characters)[;,] (the model takes|more than the model)")


class ApiError(Exception):
    """Becomes a response with this status, or the last event of a stream. param: the field of the body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": printable(str(self)), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def invalid(message: str, param: str | None = None) -> ApiError:
    """A value that is wrong in itself."""
    return ApiError(400, message, param, "invalid_value")


def unsupported(param: str, message: str) -> ApiError:
    """A request that is right, and asks for what this server does not do."""
    return ApiError(422, f"{param}: {message}", param, "unsupported_parameter")


def refused(error: RequestError) -> ApiError:
    """What the engine's own checks say; their sentence begins with the parameter's name."""
    message = str(error)
    if _TOO_LONG.search(message):
        return ApiError(400, message, None, "context_length_exceeded")
    first = message.split()[0].rstrip(":")
    names = {"max_new_tokens": "max_tokens", "the": "", "messages": "messages"}
    param = names.get(first, first if first.isidentifier() and first.islower() else "")
    return ApiError(400, message.replace("max_new_tokens", "max_tokens"), param or None, "invalid_value")


def failed(failure: Failed) -> ApiError:
    """What the engine says of a request that it did not take, or did not end."""
    if failure.kind == "invalid":
        return refused(RequestError(failure.message))
    if failure.kind == "refused":
        return ApiError(429 if failure.full else 503, failure.message, None, "overloaded" if failure.full else "down")
    return ApiError(_STATUS.get(failure.kind, 500), failure.message, None, failure.kind)
