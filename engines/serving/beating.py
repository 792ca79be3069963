"""Beating: the heartbeat of a model that computes in the server's own thread, as one without an engine does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from deepseek_trt.engines.serving.metrics import ENGINE_UP, HEARTBEATS, Board

METRICS = (HEARTBEATS, ENGINE_UP)
_SECONDS = 1.0  # from one beat to the next


class Beating:
    """Beats once a second while there is no work, or steps of it are made. Its thread alone uses the board."""

    def __init__(self, board: Board, seconds: float = _SECONDS) -> None:
        self._board, self._seconds = board, seconds
        self._works, self._steps = False, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepseek-trt-heart", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Within it, `step` is what keeps the heart beating."""
        self._works = True
        try:
            yield
        finally:
            self._works = False
            self.step()

    def step(self) -> None:
        self._steps += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        seen = -1
        while not self._ended.wait(self._seconds):
            steps = self._steps
            if not self._works or steps != seen:
                self._board.show(HEARTBEATS, 1)
                self._board.show(ENGINE_UP, 1)
            seen = steps
