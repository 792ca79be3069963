"""The bundle's weights in memory of huge pages: a step streams them all, and small pages cost a tenth of the speed."""

from __future__ import annotations

import math
import mmap
import os

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import Array, Arrays
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.bundle.weights import WeightReader

_ALIGNMENT = 64  # bytes of a cache line
_HUGE_PAGE = 2 << 20
_SHARE = 0.5  # of the free memory, at most: the page cache keeps the file as well


def weights_fit(bundle: Bundle) -> bool:
    """Whether a copy of the weights takes less than half of the memory that is free."""
    by_reference = bundle.manifest.by_reference
    sizes = [s.size for s in bundle.manifest.sources] if by_reference else [(bundle.path / WEIGHTS_FILE).stat().st_size]
    return sum(sizes) < _SHARE * available_memory()


def weights_in_memory(bundle: Bundle) -> Arrays:
    """All tensors of the bundle's weights file by name."""
    reader = WeightReader(bundle)
    sizes = {name: reader.nbytes(name) for name in reader.records}
    memory = _huge_pages(sum(map(_padded, sizes.values())))
    arrays, at = {}, 0
    for name, nbytes in sizes.items():
        arrays[name] = reader.read(name, memory[at : at + nbytes])
        at += _padded(nbytes)
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


def available_memory() -> int:
    """Bytes that the system could give without swapping, or all that it has where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
