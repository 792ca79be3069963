"""The engine's process: a bundle opened as the first message says, and requests until the server drains it or goes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Protocol

from deepseek_trt.engines.serving.process.board import Registry
from deepseek_trt.engines.serving.process.embedding import EmbeddingEngine
from deepseek_trt.engines.serving.process.generating import GeneratingEngine
from deepseek_trt.engines.serving.process.link import EngineLink
from deepseek_trt.engines.serving.process.messages import (
    AskMetrics,
    Down,
    Drain,
    Drained,
    Failed,
    Ready,
    Setup,
    ToEngine,
)
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.interface import FEATURES
from deepseek_trt.export.errors import DeepseekTrtError

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What computes for the requests of a task."""

    lines: list[str]

    def take(self, message: ToEngine) -> None:
        """A request, or the end of one; returns at once. The receiving thread alone calls it."""

    def close(self) -> None:
        """Take nothing more; returns when every request has had its end."""


def main(descriptor: int) -> None:
    """Run over the socket with this descriptor. Signals for both processes are the server's, which says what to do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    link = EngineLink(socket.socket(fileno=descriptor))
    setup = link.receive()
    if not isinstance(setup, Setup):  # the server has gone already
        return
    messages = _Messages(link)
    registry = Registry()
    try:
        engine = _opened(setup, link, registry)
    except DeepseekTrtError as error:
        link.send(Down(str(error)))
        return
    link.send(Ready(engine.lines))
    messages.hand_to(engine, registry)
    messages.drained.wait()
    engine.close()
    messages.over.set()
    link.send(Drained())
    messages.gone.wait()


def _opened(setup: Setup, link: EngineLink, registry: Registry) -> Engine:
    settings, path = ServingSettings(**setup.settings), Path(setup.bundle)
    if Bundle.open(path).manifest.task == FEATURES:
        return EmbeddingEngine(path, settings, link, registry)
    return GeneratingEngine(path, settings, link, registry)


class _Messages:
    """Receives in a thread of its own from the start: an engine whose server has gone ends, whatever it does."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._ready, self.drained = threading.Event(), threading.Event()
        self.over, self.gone = threading.Event(), threading.Event()  # all that was asked has its end; nobody asks
        threading.Thread(target=self._run, name="deepseek-trt-receiver", daemon=True).start()

    def hand_to(self, engine: Engine, registry: Registry) -> None:
        self._engine, self._registry = engine, registry
        self._ready.set()

    def _run(self) -> None:
        while (message := self._link.receive()) is not None:
            self._ready.wait()  # the server sends nothing before, but for its end
            if isinstance(message, Drain):
                self.drained.set()
            elif isinstance(message, AskMetrics):
                self._link.send(self._registry.shown(message.id))
            else:
                self._take(message)
        if not self.over.is_set():
            os._exit(1)  # nobody waits for what is computed
        self.gone.set()

    def _take(self, message: ToEngine) -> None:
        """What is raised is a bug: this request's end, and no reason to receive no more."""
        try:
            self._engine.take(message)
        except Exception as error:
            _log.exception("a message could not be taken")
            id = getattr(message, "id", None)
            if id is not None:
                self._link.send(Failed(id, "failed", f"{type(error).__name__}: {error}"))
