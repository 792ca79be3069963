"""How many threads a session may be asked for."""

from __future__ import annotations

from deepseek_trt.export.errors import RequestError

MOST_THREADS = 256  # far more than cores make a step take seconds, and a system may refuse to start them


def check_threads(threads: int) -> None:
    """RequestError unless `threads` is a whole number of threads; 0 lets the backend choose."""
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if not whole or not 0 <= threads <= MOST_THREADS:
        raise RequestError(
            f"threads {threads!r}: must lie between 0, which lets the backend choose, and {MOST_THREADS}"
        )
