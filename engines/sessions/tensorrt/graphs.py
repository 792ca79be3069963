"""CUDA graphs of one engine, by the shapes of its inputs: which runs are plain, and which are replayed.

TensorRT's first run after a change of shapes does work that cannot be captured, and what is done to a context after a
capture spoils the graph (NVIDIA's developer guide, "CUDA Graphs"). So a shape that comes back gets a context of its
own, runs there once, is captured from it, and the context is never touched again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepseek_trt.engines.sessions.tensorrt.device import Device
from deepseek_trt.engines.sessions.tensorrt.engine import Engine
from deepseek_trt.export.errors import BackendError

Key = tuple[tuple[int, ...], ...]  # the shapes of the inputs


@dataclass(frozen=True)
class Captured:
    """A graph, and the engine's context that it lives on."""

    graph: Any
    engine: Engine


class Graphs:
    """The graphs of `engine`. Where one cannot be captured its shape runs plainly from then on; `say` is told once."""

    def __init__(self, device: Device, engine: Engine, say: Callable[[str], None]) -> None:
        self._device, self._engine, self._say = device, engine, say
        self._seen: set[Key] = set()
        self._plain: set[Key] = set()
        self._captured: dict[Key, Captured] = {}

    def run(self, key: Key, enqueue: Callable[[Engine], None]) -> None:
        """Enqueue one run for inputs of these shapes; `enqueue` shapes and binds an engine, and enqueues its run."""
        held = self._captured.get(key)
        if held is not None:
            self._device.launch(held.graph)
            return
        own = self._own_context(key)
        enqueue(own or self._engine)
        if own is not None:
            self._device.synchronize()
            self._capture(key, own, enqueue)
        self._seen.add(key)

    def close(self) -> None:
        """Let go of the contexts, while their engine is still there."""
        self._captured.clear()

    def _own_context(self, key: Key) -> Engine | None:
        """A context for a shape that comes back; None the first time, and for what cannot be captured."""
        if key not in self._seen or key in self._plain:
            return None
        try:
            return self._engine.twin()
        except BackendError as error:
            self._give_up(key, str(error))
            return None

    def _capture(self, key: Key, engine: Engine, enqueue: Callable[[Engine], None]) -> None:
        if not engine.can_be_captured(self._device.stream):
            self._give_up(key, "TensorRT says that this plan's run cannot be captured; build the plans again")
            return
        try:
            self._captured[key] = Captured(self._device.capture(lambda: enqueue(engine)), engine)
        except BackendError as error:
            self._give_up(key, str(error))

    def _give_up(self, key: Key, reason: str) -> None:
        if not self._plain:
            self._say(f"decode runs without a CUDA graph, and so slower: {reason}")
        self._plain.add(key)
