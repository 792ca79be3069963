"""Signals that wait: C++ code that calls back into Python must not be left by an exception."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 1.0  # seconds after which a second signal is meant


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether to stop: SIGINT and SIGTERM do what they did before only after the block.

    A second one ends the process at once. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[tuple[int, float]] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append((number, time.monotonic()))
        if came[-1][1] - came[0][1] > _AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, note) for number in _ENDING}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0][0])
