"""GeneratingEngine: a Service whose answers go over a link as tokens; the server makes text of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepseek_trt.engines.generation.answer import Answer
from deepseek_trt.engines.generation.guide import Guide
from deepseek_trt.engines.generation.params import SamplingParams
from deepseek_trt.engines.serving.metrics import Metrics
from deepseek_trt.engines.serving.opening import open_llm
from deepseek_trt.engines.serving.process.board import Registry
from deepseek_trt.engines.serving.process.link import EngineLink
from deepseek_trt.engines.serving.process.messages import Down, Failed, Leave, Start, Taken, ToEngine, Tokens
from deepseek_trt.engines.serving.request import GenerateRequest
from deepseek_trt.engines.serving.service import Service
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.serving.stream import Failure, Response, Stream

_COMPILERS = 2  # threads that compile guides


class GeneratingEngine:
    """Takes Start and Leave; every Start is answered by Taken and Tokens, the last with a reason, or by Failed."""

    def __init__(self, path: Path, settings: ServingSettings, link: EngineLink, registry: Registry) -> None:
        llm = open_llm(path, settings)
        note = f" ({llm.session.note})" if llm.session.note else ""
        self.lines = [f"backend: {llm.session.backend}{note}, as {llm.choice.why}", *llm.defaults.lines]
        self._link = link
        self._streams: dict[int, Stream] = {}  # those that have not ended
        self._compiling: dict[int, Leave | None] = {}  # those whose guide takes its time, and who left meanwhile
        self._compilers = ThreadPoolExecutor(_COMPILERS, "deepseek-trt-compiler")
        self._handing = threading.Lock()  # guards the two dictionaries where both are looked at
        metrics, drain = Metrics(registry), settings.drain_ms / 1000
        self._service = Service(llm, settings.max_inflight, drain, metrics, _Host(link))

    def take(self, message: ToEngine) -> None:
        if isinstance(message, Start) and message.params["guide"] is not None:
            self._compiling[message.id] = None
            self._compilers.submit(self._compile, message)
        elif isinstance(message, Start):
            self._start(message)
        elif isinstance(message, Leave):
            self._leave(message)

    def close(self) -> None:
        self._service.close()
        self._compilers.shutdown()

    def _leave(self, message: Leave) -> None:
        with self._handing:
            if message.id in self._compiling:
                self._compiling[message.id] = message
            stream = self._streams.pop(message.id, None)
        if stream is not None:
            self._service.leave(stream, message.used)

    def _compile(self, message: Start) -> None:
        """Start in a thread of its own: other requests do not wait for a guide."""
        self._start(message)
        with self._handing:
            left = self._compiling.pop(message.id)
        if left is not None:
            self._leave(left)

    def _start(self, message: Start) -> None:
        channel = _Channel(self._link, message.id, self._streams)
        stream = self._service.take(channel, lambda: _parsed(message))
        if stream is not None:
            self._streams[message.id] = stream
            channel.taken()
            if channel.ended:  # before it was known here
                self._streams.pop(message.id, None)


class _Channel:
    def __init__(self, link: EngineLink, id: int, streams: dict[int, Stream]) -> None:
        self._link, self._id, self._streams = link, id, streams
        self._telling = threading.Lock()
        self._told = self.ended = False

    def taken(self) -> None:
        """Say so, once, and before any token: two threads come here."""
        with self._telling:
            if not self._told:
                self._told = True
                self._link.send(Taken(self._id))

    def send(self, response: Response | Failure | None, final: bool) -> None:
        if final:
            self.ended = True
            self._streams.pop(self._id, None)
        if isinstance(response, Response):
            self.taken()
            self._link.queue(_tokens(self._id, response))
        elif isinstance(response, Failure):
            self._link.queue(Failed(self._id, response.kind, response.message, response.full))

    def is_cancelled(self) -> bool:
        return False  # the server says so by itself


class _Host:
    """The server; an engine that has failed takes it down, for somebody to start it again."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link

    def wants_model(self) -> bool:
        return True

    def engine_failed(self, reason: str) -> None:
        self._link.send(Down(reason))

    def flush(self) -> None:
        self._link.flush()


def _parsed(message: Start) -> tuple[GenerateRequest, Answer]:
    guide = message.params["guide"]
    params = SamplingParams(**{**message.params, "guide": None if guide is None else Guide(*guide)})
    request = GenerateRequest(message.prompt_ids, params, True, "", message.timeout_ms, tokens_alone=True)
    return request, Answer(None, params)


def _tokens(id: int, response: Response) -> Tokens:
    pieces = response.pieces
    logprobs = None if response.logprobs is None else list(response.logprobs)
    likeliest = [piece.likeliest for piece in pieces]
    tokens = [piece.token_id for piece in pieces]
    return Tokens(id, tokens, response.finish_reason, logprobs, likeliest if any(likeliest) else None)
