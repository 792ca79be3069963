"""Memory of huge pages, for what every step streams: small pages cost a tenth of the speed."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.export.bundle.weights import WeightReader

_ALIGNMENT = 64  # bytes of a cache line
_HUGE_PAGE = 2 << 20

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def read_weights(reader: WeightReader, names: Sequence[str], progress: Progress) -> Arrays:
    """These tensors by name, each read or assembled once, where it stays."""
    sizes = {name: reader.nbytes(name) for name in names}
    total = sum(sizes.values())
    memory = _huge_pages(sum(map(_padded, sizes.values())))
    arrays, at, done = {}, 0, 0
    for name, nbytes in sizes.items():
        arrays[name] = reader.read(name, memory[at : at + nbytes])
        at, done = at + _padded(nbytes), done + nbytes
        progress(done, total)
    return arrays


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An array that takes memory where it is written, in huge pages where it is large enough to fill some."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < _HUGE_PAGE:
        return np.zeros(shape, dtype)
    return _huge_pages(nbytes).view(dtype).reshape(shape)


def _huge_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
