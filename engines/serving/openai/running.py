"""run: the server's event loop, from an engine that opens its bundle to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from deepseek_trt.engines.generation.defaults import SamplingDefaults
from deepseek_trt.engines.serving.heart import STALL_SECONDS
from deepseek_trt.engines.serving.openai.app import Api, Door
from deepseek_trt.engines.serving.openai.served import Served
from deepseek_trt.engines.serving.process.client import EngineClient
from deepseek_trt.engines.serving.process.link import ServerLink
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.text.parsing.choose import Formats
from deepseek_trt.engines.text.text import Text
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import FEATURES

_SLOW_CLIENTS = 5  # seconds for clients to read the ends of their answers
_KEEP_ALIVE = 30  # seconds for a connection without a request


Announce = Callable[[str, tuple[str, ...]], None]


@dataclass(frozen=True)
class Parts:
    """What a server is made of; certificates are a PEM file and that of its key.

    stall_seconds: an engine that makes no step for so long takes the server down.
    """

    bundle: Bundle
    text: Text | None
    settings: ServingSettings
    formats: Formats
    defaults: SamplingDefaults
    names: tuple[str, ...]
    door: Door
    certificates: tuple[Path, Path | None] | None = None
    stall_seconds: float = STALL_SECONDS


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run`: uvicorn would end the process by the signal when all is done."""
        yield


async def run(
    parts: Parts,
    listener: socket.socket,
    ours: socket.socket,
    pid: int,
    say: Callable[[str], None],
    announce: Announce,
) -> str:
    """Serve until a signal, with the engine in process `pid`; gives why it went before, or nothing.

    Raises BackendError where it cannot open the bundle.
    """
    stop, hurry = _signals()
    engine = EngineClient(await ServerLink.over(ours))
    opening = asyncio.create_task(engine.open(str(parts.bundle.path), dataclasses.asdict(parts.settings)))
    await _first(opening, stop.wait())
    if not opening.done():
        opening.cancel()
        return ""
    for line in opening.result():
        say(line)
    api = Api(_served(parts, engine), parts.door, parts.bundle.manifest.task == FEATURES)
    server = _Server(_config(parts, api))
    serving = asyncio.create_task(server.serve([listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.005)
    watching = asyncio.create_task(engine.watch(pid, parts.stall_seconds))
    announce(_address(listener, parts.certificates is not None), parts.names)
    await _first(serving, stop.wait(), engine.lost.wait())
    api.stopping = True
    orderly = stop.is_set() and not engine.lost.is_set()
    if orderly:
        say("stopping: no requests are taken any more, and answers end")
        await _first(engine.drain(), hurry.wait())
        orderly = engine.drained or hurry.is_set()
    server.should_exit, server.force_exit = True, hurry.is_set()
    await serving
    watching.cancel()
    engine.close()
    return "" if orderly else engine.down


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the first and of the second SIGTERM or SIGINT."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def come() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, come)
    return stop, hurry


async def _first(*waits: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Return when one of them is done; coroutines are cancelled, tasks are left."""
    made = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(made, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(made, waits, strict=True):
        if task is not wait:
            task.cancel()


def _served(parts: Parts, engine: EngineClient) -> Served:
    settings = parts.settings
    return Served(
        names=parts.names,
        text=parts.text,
        engine=engine,
        defaults=parts.defaults,
        formats=parts.formats,
        max_model_len=settings.max_model_len,
        max_choices=settings.max_inflight,
    )


def _config(parts: Parts, api: Api) -> uvicorn.Config:
    certificate, key = parts.certificates or (None, None)
    return uvicorn.Config(
        api.app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_SLOW_CLIENTS,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def _address(listener: socket.socket, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}:{port}/v1"
