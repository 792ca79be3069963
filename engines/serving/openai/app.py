"""The routes: bodies read and bounded, keys checked, answers written, whole or as events; clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deepseek_trt.engines.serving.metrics import ACCEPTING
from deepseek_trt.engines.serving.openai.bodies import ChatBody, CompletionBody, EmbeddingBody, read_body
from deepseek_trt.engines.serving.openai.chat import Chat
from deepseek_trt.engines.serving.openai.completions import Completions
from deepseek_trt.engines.serving.openai.embeddings import embeddings
from deepseek_trt.engines.serving.openai.errors import ApiError, refused
from deepseek_trt.engines.serving.openai.served import Served
from deepseek_trt.engines.serving.process.board import prometheus_text, value_of
from deepseek_trt.export.errors import RequestError

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_BODY_SECONDS = 60.0  # for a client to send its body
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Any]]


@dataclass(frozen=True)
class Door:
    """Who may come in, and with how much. Without keys everybody may."""

    keys: tuple[str, ...] = ()
    most_bytes: int = 16 * 2**20

    def check(self, request: Request) -> None:
        """ApiError unless the request bears one of the keys; all are compared, in constant time."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in self.keys]
        if self.keys and not (any(right) and scheme.lower() == "bearer"):
            raise ApiError(401, "give one of the server's keys: Authorization: Bearer KEY", None, "invalid_api_key")

    async def body(self, request: Request) -> bytes:
        """The whole body. ApiError for one that is too large, or does not come."""
        try:
            return await asyncio.wait_for(self._body(request), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body has not come within {_BODY_SECONDS:g} seconds", None, "timeout") from None

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and len(announced) < 20 and int(announced) > self.most_bytes:
            raise self._too_large()
        async for part in request.stream():
            size += len(part)
            if size > self.most_bytes:
                raise self._too_large()
            parts.append(part)
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.most_bytes} bytes: send less", None, "body_too_large")


class Generation(Protocol):
    """A request that the engine has taken."""

    async def whole(self) -> dict[str, Any]: ...

    def chunks(self) -> AsyncGenerator[dict[str, Any], None]: ...

    def leave(self) -> None: ...


class Api:
    """Answers for what is served, while `stopping` is not set."""

    def __init__(self, served: Served, door: Door, embeds: bool) -> None:
        self._served, self._door = served, door
        self.stopping = False
        posts = (
            {"/v1/embeddings": self._embed}
            if embeds
            else {"/v1/completions": self._complete, "/v1/chat/completions": self._chat}
        )
        gets = {"/v1/models": self._models, "/v1/models/{name:path}": self._model}
        gets |= {"/health": self._health, "/health/live": self._live, "/health/ready": self._ready}
        gets |= {"/metrics": self._metrics}
        routes = [Route(path, _endpoint(handler, path, door), methods=["POST"]) for path, handler in posts.items()]
        routes += [Route(path, _endpoint(handler, path, door), methods=["GET"]) for path, handler in gets.items()]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    async def _complete(self, request: Request) -> Any:
        body = read_body(CompletionBody, await self._door.body(request))
        self._served.check_model(body.model)
        return await self._generation(request, bool(body.stream), Completions.ask(self._served, body))

    async def _chat(self, request: Request) -> Any:
        body = read_body(ChatBody, await self._door.body(request))
        self._served.check_model(body.model)
        return await self._generation(request, bool(body.stream), Chat.ask(self._served, body))

    async def _embed(self, request: Request) -> Any:
        body = read_body(EmbeddingBody, await self._door.body(request))
        self._served.check_model(body.model)
        return _json(await _unless_gone(request, embeddings(self._served, body)))

    async def _generation(self, request: Request, stream: bool, asking: Coroutine[Any, Any, Generation]) -> Any:
        """The answer in one or in events; who leaves before it ends frees what it holds."""
        taken = await asking
        if stream:
            return _Events(taken)
        try:
            return _json(await _unless_gone(request, taken.whole()))
        finally:
            taken.leave()

    async def _models(self, request: Request) -> Any:
        return _json({"object": "list", "data": [self._described(name) for name in self._served.names]})

    async def _model(self, request: Request) -> Any:
        return _json(self._described(self._served.check_model(request.path_params["name"])))

    def _described(self, name: str) -> dict[str, Any]:
        served = self._served
        own = {"id": name, "object": "model", "created": served.created, "owned_by": "deepseek-trt"}
        return {**own, "max_model_len": served.max_model_len}

    async def _health(self, request: Request) -> Any:
        """200 while the engine lives and the server does not drain."""
        return _state(self._served.engine.down or self._drains)

    async def _live(self, request: Request) -> Any:
        """200 unless somebody must start the server again: who drains is well."""
        return _state(self._served.engine.down)

    async def _ready(self, request: Request) -> Any:
        """200 while one more request would be taken."""
        engine = self._served.engine
        shown = None if engine.down or self.stopping else await engine.metrics()
        if shown is None:
            return _state(engine.down or self._drains or "the engine does not answer")
        full = f"{self._served.max_choices} requests are in flight, the most allowed"
        return _state(self._drains or ("" if value_of(shown, ACCEPTING) else full))

    @property
    def _drains(self) -> str:
        return "the server is stopping" if self.stopping else ""

    async def _metrics(self, request: Request) -> Any:
        shown = await self._served.engine.metrics()
        if shown is None:
            raise ApiError(503, self._served.engine.down or "the engine does not answer", None, "down")
        text = prometheus_text(shown, self._served.names[0])
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _state(why: str) -> Response:
    """What a probe is told: what is wrong, or that nothing is."""
    if why:
        raise ApiError(503, why, None, "down")
    return _json({"status": "ok"})


class _Events:
    """A streamed answer as server-sent events; a failure on the way is one more, as OpenAI's clients know it."""

    def __init__(self, taken: Generation) -> None:
        self._taken = taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_gone(receive))
        writing = asyncio.create_task(self._write(send))
        try:
            await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._taken.leave()
            for task in (gone, writing):
                task.cancel()
            await asyncio.gather(gone, writing, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._taken.chunks()) as chunks:
            try:
                async for chunk in chunks:
                    await send(_event(_encode(chunk)))
            except Exception as error:
                await send(_event(_encode(_as_api_error(error).body)))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _event(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}


def _endpoint(handler: Handler, path: str, door: Door) -> Handler:
    async def endpoint(request: Request) -> Any:
        try:
            if path.startswith("/v1/"):
                door.check(request)
            return await handler(request)
        except Exception as error:
            return _error(_as_api_error(error))

    return endpoint


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return refused(error)
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client has gone", None, "cancelled")
    _log.error("a request has failed", exc_info=error)  # a bug: this request's end and no other's
    return ApiError(500, f"{type(error).__name__}: {error}", None, "failed")


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette says of paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", None, None)
    return _error(told, error.headers)


def _error(error: ApiError, headers: Any = None) -> Response:
    close = {"connection": "close"} if error.status in (408, 413) else {}  # the rest of the body is not read
    return _json(error.body, error.status, {**error.headers, **(headers or {}), **close})


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(_encode(value), status, headers, "application/json")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client goes, and then the answer reaches nobody."""
    working, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone", None, "cancelled")
        return await working
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
