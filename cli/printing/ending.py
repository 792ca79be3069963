"""How the program begins and ends: its streams, its exit code, and one line where a signal ends it.

Only the standard library is imported here, so that a signal is met from the first import of the rest on.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = 1.0  # seconds after the first signal from which another is meant: some send theirs twice
_LAST_WORDS = "stopped by"
_BROKEN_PIPE = 128 + signal.SIGPIPE  # as of a program that the signal ended
_came: list[tuple[int, float]] = []
_running = False


def run_program(command: Callable[[], Any]) -> None:
    """Run `command` and exit as it says: 130 for Ctrl-C, 143 for SIGTERM, 141 where nobody reads what it writes."""
    global _running
    if _running:
        command()
        return
    _running = True
    _open_streams()
    for ending in _ENDING:
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup, and a shell for what runs in the background, ask
            signal.signal(ending, _note)
    code = _code_of(command)
    if _came:
        number = _came[0][0]
        _remove_leftovers()
        sys.stderr.write(f"{_LAST_WORDS} {signal.Signals(number).name}\n")
        _flush(0)
        os._exit(128 + number)  # what a thread still does must not keep it here
    for ending in _ENDING:
        if signal.getsignal(ending) is _note:
            signal.signal(ending, signal.SIG_DFL)
    sys.exit(_flush(code))


def is_stopping() -> bool:
    """Whether a signal came that ends the program: what goes wrong from then on is not worth a word."""
    return bool(_came)


def leave_broken_pipe() -> SystemExit:
    """What to raise to exit quietly, once whoever reads standard output has left."""
    _drop_output()
    return SystemExit(_BROKEN_PIPE)


def _note(number: int, _: FrameType | None) -> None:
    """Leave by an exception, so that all is cleaned up; at once where a second signal says so."""
    _came.append((number, time.monotonic()))
    if len(_came) == 1:
        raise _Stopped
    if _came[-1][1] - _came[0][1] > _AGAIN:
        os._exit(128 + number)


def _code_of(command: Callable[[], Any]) -> Any:
    try:
        command()
    except SystemExit as exit_:
        return exit_.code
    except BaseException:
        if not _came:
            raise
    return 0


def _remove_leftovers() -> None:
    """What the signal kept from being removed, where it came in the middle of that: no other exception comes now."""
    working = sys.modules.get("deepseek_trt.export.writing.working")
    if working:
        with suppress(OSError):
            working.release_claims()


def _open_streams() -> None:
    """Give the numbers of closed streams to nothing else: a file opened there would get what libraries print.

    Writing to a closed standard output fails, as it does in C; what standard error cannot take is dropped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY), True)
    # The second name, as Python itself has it, keeps the stream: one that nothing holds closes what it writes to.
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")  # type: ignore[misc]
    if sys.stderr is None:
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8")  # type: ignore[misc]
    for stream in (sys.stdout, sys.stderr):  # names of files may be no UTF-8, and a terminal may know less than it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Lenient(
            sys.stderr.buffer, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True
        )


class _Stopped(BaseException):
    """A signal came. No SystemExit: C code that prints one of those ends the process there and then."""


class _Lenient(io.TextIOWrapper):
    """Standard error that never fails, and has nothing to say of what a signal has interrupted."""

    def write(self, text: str) -> int:
        if not _came or text.startswith(_LAST_WORDS):
            with suppress(OSError):
                super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _flush(code: Any) -> Any:
    """The exit code, once standard output has taken all: another one where it did not."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return code or _BROKEN_PIPE
    except OSError as error:
        _drop_output()
        if not code:
            print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return code or 1
    return code


def _drop_output() -> None:
    """Let what standard output still holds go nowhere, or Python fails once more when it ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
