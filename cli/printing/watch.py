"""Watch: how long each step of a command takes."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]


class Watch:
    """Runs from when it is made; `say` gets a line when a step is over, and one of all steps at the end."""

    def __init__(self, say: Say, clock: Callable[[], float] = time.perf_counter) -> None:
        self._say, self._clock = say, clock
        self._begin = self._step_began = clock()
        self._step = "start"

    def next(self, step: str) -> None:
        """A step begins, so that the one before is over."""
        now = self._clock()
        self._say(f"{now - self._step_began:.2f} s: {self._step}")
        self._step, self._step_began = step, now

    def end(self) -> None:
        """The last step is over."""
        self.next("")
        self._say(f"{self._clock() - self._begin:.2f} s in all")
