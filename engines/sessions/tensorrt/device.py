"""Device: what sessions ask of one NVIDIA GPU with one stream; a stand-in can take its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256  # bytes; what TensorRT asks of activation memory, and more than what the kernels ask of tensors


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up so that what comes next is aligned."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory: `array` uint8 [n] at `address`. Do not touch it once it is given back."""

    address: int
    array: npt.NDArray[np.uint8]


class Device(Protocol):
    """Memory, copies and graphs on one stream, in order. Addresses are plain numbers; sizes are in bytes.

    Everything but `read`, `write`, `wait` and `synchronize` only enqueues.
    """

    name: str
    sm: int
    stream: int

    def activate(self) -> None:
        """Make this GPU the calling thread's, for TensorRT's calls too."""

    def allocate(self, nbytes: int, what: str) -> int:
        """Memory on the GPU until `close`; BackendError naming `what` when there is not enough."""

    def pin(self, nbytes: int) -> Pinned: ...

    def unpin(self, memory: Pinned) -> None: ...

    def zero(self, address: int, nbytes: int) -> None: ...

    def upload(self, target: int, source: int, nbytes: int) -> None:
        """From pinned memory at `source` to the GPU."""

    def download(self, target: int, source: int, nbytes: int) -> None:
        """From the GPU to pinned memory at `target`."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Within the GPU's memory."""

    def read(self, source: int, array: npt.NDArray[Any]) -> None:
        """Fill a contiguous array from the GPU."""

    def write(self, target: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the GPU."""

    def mark(self) -> Any:
        """The present end of the stream, to `wait` for."""

    def wait(self, mark: Any) -> None: ...

    def synchronize(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` enqueues, as a CUDA graph; nothing is run yet."""

    def launch(self, graph: Any) -> None: ...

    def load_kernel(self, image: bytes, entry: str, shared_bytes: int) -> Any:
        """A kernel of compiled code or PTX, until `close`; BackendError where the driver refuses it."""

    def launch_kernel(
        self, kernel: Any, grid: tuple[int, int], threads: int, shared_bytes: int, addresses: Sequence[int]
    ) -> None:
        """Enqueue a kernel of Triton's whose arguments are all addresses on the GPU."""

    def close(self) -> None:
        """Give back all memory and graphs; more calls do nothing."""
