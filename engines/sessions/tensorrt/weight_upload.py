"""The bundle's weights onto a GPU: each once, through pinned memory, in the order of their file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_trt.engines.sessions.tensorrt.device import ALIGNMENT, Device, Pinned
from deepseek_trt.export.bundle.folder import Bundle, WeightRecord
from deepseek_trt.export.bundle.weights import reference_arrays, weight_arrays
from deepseek_trt.export.dtypes import dtype_bytes

STAGING_BYTES = 32 * 2**20  # of each of two pinned buffers
ASSEMBLED_BYTES = 2**30  # of by-reference tensors held in memory at once, or one tensor where that is larger

UploadProgress = Callable[[int, int], None]  # bytes done, bytes in all


def upload_weights(
    device: Device, bundle: Bundle, names: Collection[str], progress: UploadProgress | None = None
) -> dict[str, int]:
    """The weights' addresses by name, in one block of memory; they are complete when this returns.

    Raises BackendError where the GPU is too small, before anything is read, and BundleError where a by-reference
    bundle's checkpoint has changed.
    """
    wanted = [w for w in bundle.manifest.weights if w.recipe.name in names]
    if not wanted:
        return {}
    offsets, total = _lay_out(wanted)
    base = device.allocate(total, "the model's weights")
    addresses = {name: base + offset for name, offset in offsets.items()}
    payload, done = sum(map(_nbytes, wanted)), 0
    stager = _Stager(device)
    try:
        for name, array in _arrays(bundle, wanted):
            for nbytes in stager.send(addresses[name], array):
                done += nbytes
                if progress:
                    progress(done, payload)
    finally:
        stager.close()
    return addresses


def _nbytes(weight: WeightRecord) -> int:
    return weight.recipe.size * dtype_bytes(weight.dtype)


def _lay_out(weights: list[WeightRecord]) -> tuple[dict[str, int], int]:
    """Each tensor's offset, and the size of all."""
    offsets, at = {}, 0
    for weight in weights:
        offsets[weight.recipe.name] = at
        at += -(-_nbytes(weight) // ALIGNMENT) * ALIGNMENT
    return offsets, at


def _arrays(bundle: Bundle, wanted: list[WeightRecord]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if not bundle.manifest.by_reference:
        mapped = weight_arrays(bundle)
        yield from ((w.recipe.name, mapped[w.recipe.name]) for w in wanted)
        return
    for group in _groups(wanted):
        assembled = reference_arrays(bundle, group)
        for name in group:
            yield name, assembled.pop(name)


def _groups(wanted: list[WeightRecord]) -> Iterator[list[str]]:
    """Tensors assembled together: a checkpoint's headers are read once a group."""
    group: list[str] = []
    held = 0
    for weight in wanted:
        if group and held + _nbytes(weight) > ASSEMBLED_BYTES:
            yield group
            group, held = [], 0
        group.append(weight.recipe.name)
        held += _nbytes(weight)
    if group:
        yield group


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
