"""The bundle's weights in memory of huge pages: a step streams them all, and small pages cost a tenth of the speed."""

from __future__ import annotations

import math
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.export.arrays import numpy_dtype
from deepseek_trt.export.bundle.folder import WEIGHTS_FILE, Bundle
from deepseek_trt.export.checkpoint import read_header

Arrays = dict[str, npt.NDArray[Any]]
_ALIGNMENT = 64  # bytes of a cache line
_HUGE_PAGE = 2 << 20
_SHARE = 0.5  # of the free memory, at most: the page cache keeps the file as well


def weights_fit(bundle: Bundle) -> bool:
    """Whether a copy of the weights takes less than half of the memory that is free."""
    by_reference = bundle.manifest.by_reference
    sizes = [s.size for s in bundle.manifest.sources] if by_reference else [(bundle.path / WEIGHTS_FILE).stat().st_size]
    return sum(sizes) < _SHARE * _available_memory()


def weights_in_memory(bundle: Bundle) -> Arrays:
    """All graph tensors of the weights file by name, in the bundle's dtype."""
    file = bundle.path / WEIGHTS_FILE
    tensors = list(read_header(file))
    memory = _huge_pages(sum(_padded(t.nbytes) for t in tensors))
    arrays, at = {}, 0
    with file.open("rb", buffering=0) as stream:
        for tensor in tensors:
            data = memory[at : at + tensor.nbytes]
            _read(stream.fileno(), tensor.offset, data)
            arrays[tensor.name] = data.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)
            at += _padded(tensor.nbytes)
    return arrays


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
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


def _read(file: int, offset: int, into: npt.NDArray[np.uint8]) -> None:
    view = into.data
    while len(view):
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise EOFError(f"the weights file ends at {offset}")
        view, offset = view[count:], offset + count


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _available_memory() -> int:
    """Bytes that the system could give without swapping; 0 where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return 0
    return 1024 * int(sizes[0]) if sizes else 0
