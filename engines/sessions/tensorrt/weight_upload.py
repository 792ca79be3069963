"""The bundle's weights onto a GPU: each once, through pinned memory, in the order of their file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.sessions.tensorrt.device import Device, Pinned, aligned
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.bundle.recipes import tensorrt_parts
from deepseek_trt.export.bundle.weights import WeightReader

STAGING_BYTES = 32 * 2**20  # of each of two pinned buffers

UploadProgress = Callable[[int, int], None]  # bytes done, bytes in all


def upload_weights(
    device: Device, bundle: Bundle, names: Collection[str], progress: UploadProgress | None = None
) -> dict[str, int]:
    """The addresses of the weights, or of the parts that TensorRT takes them in, by name, in one block of memory; they
    are complete when this returns.

    Raises BackendError where the GPU is too small, before a weight is read, and BundleError where a by-reference
    bundle's checkpoint has changed.
    """
    parts = {w.recipe.name: tensorrt_parts(w.recipe) for w in bundle.manifest.weights}
    wanted = [name for name, of in parts.items() if any(part.name in names for part in of)]
    if not wanted:
        return {}
    reader = WeightReader(bundle)
    sizes = {name: reader.nbytes(name) for name in wanted}
    base = device.allocate(sum(map(aligned, sizes.values())), "the model's weights")
    addresses = dict(zip(sizes, itertools.accumulate(map(aligned, sizes.values()), initial=base), strict=False))
    payload, done = sum(sizes.values()), 0
    stager = _Stager(device)
    try:
        for name, address in addresses.items():
            for nbytes in stager.send(address, reader.view(name)):
                done += nbytes
                if progress:
                    progress(done, payload)
    finally:
        stager.close()
    row_bytes = {name: sizes[name] // reader.records[name].recipe.shape[0] for name in wanted}
    return {part.name: addresses[name] + part.start * row_bytes[name] for name in wanted for part in parts[name]}


class _Stager:
    """Two pinned buffers in turn: one is filled from disk while the other is on its way."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[Pinned] = [device.pin(STAGING_BYTES) for _ in range(2)]
        self._sent: list[Any] = [None, None]  # marks of the last copy from each buffer
        self._turn = 0

    def send(self, target: int, array: npt.NDArray[Any]) -> Iterator[int]:
        """Enqueue the array's bytes to `target`; yields the size of each piece."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, data.size, STAGING_BYTES):
            piece = data[start : start + STAGING_BYTES]
            self._send_piece(target + start, piece)
            yield piece.size

    def _send_piece(self, target: int, piece: npt.NDArray[np.uint8]) -> None:
        buffer, mark = self._buffers[self._turn], self._sent[self._turn]
        if mark is not None:
            self._device.wait(mark)
        buffer.array[: piece.size] = piece
        self._device.upload(target, buffer.address, piece.size)
        self._sent[self._turn] = self._device.mark()
        self._turn = 1 - self._turn

    def close(self) -> None:
        for mark in self._sent:
            if mark is not None:
                self._device.wait(mark)
        for buffer in self._buffers:
            self._device.unpin(buffer)
