"""EngineClient: the engine's process as the server's event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from deepseek_trt.engines.serving.heart import Heart, cpu_seconds
from deepseek_trt.engines.serving.metrics import HEARTBEATS
from deepseek_trt.engines.serving.process.board import value_of
from deepseek_trt.engines.serving.process.link import ServerLink
from deepseek_trt.engines.serving.process.messages import (
    AskMetrics,
    Down,
    Drain,
    Drained,
    Embed,
    Failed,
    Leave,
    Ready,
    Setup,
    Shown,
    Start,
    Taken,
    Tokens,
    ToServer,
    Vectors,
)
from deepseek_trt.export.errors import BackendError

Answer = Taken | Tokens | Failed | Vectors | Shown
_REST = 2  # times as long as work took
_LONGEST_REST = 0.02  # seconds
_METRICS_SECONDS = 5.0  # for an engine's process to say its metrics
_LOOK_SECONDS = 0.5  # from one look at its heart to the next
ENDED = "the engine's process has ended"


class Asked:
    """One request: what comes back, in order, until it is over or left."""

    def __init__(self, client: EngineClient, id: int) -> None:
        self._client, self.id = client, id
        self._come: asyncio.Queue[Answer] = asyncio.Queue()

    def put(self, answer: Answer) -> None:
        self._come.put_nowait(answer)

    async def next(self) -> Answer:
        return await self._come.get()

    def waiting(self) -> Iterable[Answer]:
        """What has come and can be had at once."""
        while not self._come.empty():
            yield self._come.get_nowait()

    def leave(self, used: int | None) -> None:
        """Nothing more is wanted; see Leave. A second time does nothing."""
        self._client.leave(self.id, used)


class EngineClient:
    """Belongs to one event loop. `down` says why nothing can be asked any more, or is empty; `lost` is set with it."""

    def __init__(self, link: ServerLink) -> None:
        self._link = link
        self._ids = itertools.count()
        self._asked: dict[int, Asked] = {}
        self._drained = asyncio.Event()
        self.lost = asyncio.Event()
        self.down, self.drained = "", False

    async def open(self, bundle: str, settings: dict[str, Any]) -> list[str]:
        """Wait until the engine has computed once; what it says of itself. BackendError where it cannot."""
        self._link.send(Setup(bundle, settings))
        message = await self._link.receive()
        if isinstance(message, Ready):
            self._reading = asyncio.create_task(self._read())
            return message.lines
        raise BackendError(message.reason if isinstance(message, Down) else f"{ENDED} while it opened the bundle")

    def generate(self, prompt_ids: list[int], params: dict[str, Any], timeout_ms: int | None) -> Asked:
        asked = self._new()
        self._link.send(Start(asked.id, prompt_ids, params, timeout_ms))
        return asked

    @contextlib.asynccontextmanager
    async def embed(self, rows: list[list[int]]) -> AsyncIterator[Asked]:
        """Ask for rows' vectors; who leaves the context does not wait for them any more."""
        asked = self._new()
        self._link.send(Embed(asked.id, rows))
        try:
            yield asked
        finally:
            asked.leave(None)

    async def metrics(self) -> Shown | None:
        """None where the engine is down, or does not answer: what answers waits for no step of it."""
        asked = self._new()
        self._link.send(AskMetrics(asked.id))
        try:
            answer = await asyncio.wait_for(asked.next(), _METRICS_SECONDS)
        except asyncio.TimeoutError:
            return None
        finally:
            self._asked.pop(asked.id, None)
        return answer if isinstance(answer, Shown) else None

    async def watch(self, pid: int, seconds: float) -> None:
        """Lose the engine, whose process this is, once it has stood still for so long."""
        heart, looked = Heart(seconds), time.monotonic()
        heart.look(-1, None, 0)  # it has opened its bundle: it may stand still from here on
        while not self.down:
            await asyncio.sleep(_LOOK_SECONDS)
            shown = await self.metrics()
            now = time.monotonic()
            heart.look(value_of(shown, HEARTBEATS) if shown else None, cpu_seconds(pid), now - looked)
            looked = now
            if heart.stopped:
                self._lose(f"the engine stands still: it has made no step for {seconds:g} s")
                self._drained.set()

    def leave(self, id: int, used: int | None) -> None:
        if self._asked.pop(id, None) is not None:
            self._link.send(Leave(id, used))

    async def drain(self) -> None:
        """Have nothing more taken; returns when every request has had its end."""
        self._link.send(Drain())
        await self._drained.wait()

    def close(self) -> None:
        self._link.close()

    def _new(self) -> Asked:
        asked = Asked(self, next(self._ids))
        if self.down:
            asked.put(Failed(asked.id, "refused", self.down))
        else:
            self._asked[asked.id] = asked
        return asked

    async def _read(self) -> None:
        """Rest twice as long as what came took: with many streams more tokens go out at once, and the engine has the
        processor most of the time where there are few.
        """
        while (messages := await self._link.receive_all()) is not None:
            began = time.perf_counter()
            for message in messages:
                self._handle(message)
            await asyncio.sleep(0)  # those who waited for them write
            await asyncio.sleep(min(_REST * (time.perf_counter() - began), _LONGEST_REST))
        self._lose(ENDED)
        self._drained.set()

    def _handle(self, message: ToServer) -> None:
        if isinstance(message, Down):
            self._lose(message.reason)
        elif isinstance(message, Drained):
            self.drained = True
            self._drained.set()
        elif not isinstance(message, Ready):
            asked = self._asked.get(message.id)
            if asked is None:  # it was left
                return
            asked.put(message)
            if isinstance(message, Failed) or (isinstance(message, Tokens) and message.finish):
                del self._asked[message.id]

    def _lose(self, reason: str) -> None:
        self.down = self.down or reason
        self.lost.set()
        for asked in (*self._asked.values(),):
            asked.put(Failed(asked.id, "failed", self.down))
        self._asked.clear()
