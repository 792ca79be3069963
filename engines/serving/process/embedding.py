"""EmbeddingEngine: vectors for rows of tokens, a request after another."""

from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path

from deepseek_trt.engines.serving import metrics as m
from deepseek_trt.engines.serving.process.board import Registry
from deepseek_trt.engines.serving.process.link import EngineLink
from deepseek_trt.engines.serving.process.messages import Embed, Failed, Leave, ToEngine, Vectors
from deepseek_trt.engines.serving.settings import ServingSettings
from deepseek_trt.engines.tasks.embed import Embedder
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import DeepseekTrtError, RequestError

_BEAT_SECONDS = 1.0  # from one beat of an idle engine to the next
_ROWS = 8  # computed at once: each is as wide as the longest of them


class EmbeddingEngine:
    """Takes up to max_inflight requests at once; each is answered by Vectors or Failed."""

    def __init__(self, path: Path, settings: ServingSettings, link: EngineLink, registry: Registry) -> None:
        self._embedder = Embedder(Bundle.open(path))
        note = f" ({self._embedder.session.note})" if self._embedder.session.note else ""
        self.lines = [f"backend: {self._embedder.session.backend}{note}"]
        self._link, self._most = link, settings.max_inflight
        self._metrics = m.Metrics(registry)
        self._drain = settings.drain_ms / 1000
        self._waiting: queue.Queue[Embed | None] = queue.Queue()
        self._live: set[int] = set()  # not answered, and still wanted
        self._closed, self._beats, self._running = False, 0, 0
        self._thread = threading.Thread(target=self._run, name="deepseek-trt-engine", daemon=True)
        self._thread.start()

    def take(self, message: ToEngine) -> None:
        if isinstance(message, Leave):
            self._live.discard(message.id)
        elif isinstance(message, Embed):
            refusal = self._refusal()
            if refusal is None:
                self._live.add(message.id)
                self._waiting.put(message)
            else:
                self._link.send(Failed(message.id, "refused", *refusal))

    def close(self) -> None:
        self._closed = True
        self._waiting.put(None)
        self._thread.join(self._drain)

    def _refusal(self) -> tuple[str, bool] | None:
        if self._closed:
            return "the server is stopping", False
        full = len(self._live) >= self._most
        return (f"{self._most} requests are in flight, the most allowed: try again later", True) if full else None

    def _run(self) -> None:
        while (message := self._next()) is not None:
            self._running = 1
            self._beat()
            result = self._answer(message) if message.id in self._live else "cancelled"
            self._running = 0
            self._live.discard(message.id)
            tokens = sum(map(len, message.rows)) if result == "ok" else 0
            self._metrics.ended(m.Ended(result, input_tokens=tokens))
            self._metrics.flush(None, self._held)

    def _next(self) -> Embed | None:
        while True:
            self._beat()
            with contextlib.suppress(queue.Empty):
                return self._waiting.get(timeout=_BEAT_SECONDS)

    def _beat(self) -> None:
        self._beats += 1
        self._metrics.flush(None, self._held)

    def _held(self) -> dict[m.MetricSpec, float]:
        taken = len(self._live)
        return {
            m.HEARTBEATS: self._beats,
            m.ENGINE_UP: 1,
            m.ACCEPTING: int(self._refusal() is None),
            m.RUNNING: self._running,
            m.QUEUED: max(taken - self._running, 0),
            m.INFLIGHT: taken,
        }

    def _answer(self, message: Embed) -> str:
        """Send the vectors, or why there are none; gives the result for the metrics."""
        try:
            rows: list[bytes] = []
            for start in range(0, len(message.rows), _ROWS):
                if message.id not in self._live:
                    return "cancelled"
                self._beat()
                made = self._embedder.embed(message.rows[start : start + _ROWS])
                rows += [row.astype("<f4").tobytes() for row in made]
        except DeepseekTrtError as error:
            kind = "invalid" if isinstance(error, RequestError) else "failed"
            self._link.send(Failed(message.id, kind, str(error)))
            return kind
        except Exception as error:  # a bug, or no memory: this request's end and no other's
            self._link.send(Failed(message.id, "failed", f"{type(error).__name__}: {error}"))
            return "failed"
        self._link.send(Vectors(message.id, rows))
        return "ok"
