"""How many threads torch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_ONE_THREAD = 50e6  # parameters below which threads wait for each other longer than they compute


@contextmanager
def torch_threads(parameters: int, asked: int = 0) -> Iterator[None]:
    """Within it torch has the threads that are `asked`; where that is 0, one for a small model, else those it has.

    Threads spin while they wait: on a busy machine two of them take several times as long over a small model as one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(asked or (1 if parameters < _ONE_THREAD else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
