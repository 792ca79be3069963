"""WrittenTensor: a graph tensor in the weights file, and what is to be said of what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_trt.export.numbers import Numbers

Progress = Callable[[int], None]  # called with the bytes done since the last call


@dataclass(frozen=True)
class WrittenTensor:
    """A graph tensor in the weights file. `odd` names what it was made of that holds NaN, infinities or only zeros."""

    name: str
    offset: int
    nbytes: int
    sha256: str = ""
    odd: tuple[Numbers, ...] = ()
    error: float | None = None  # of codes: the root of the mean squared error, relative to the weight's
