"""Staging: a step's inputs, side by side in pinned memory and on the GPU, so that one copy brings them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deepseek_trt.engines.plans.plan import PlanRecord
from deepseek_trt.engines.sessions.tensorrt.device import Device, aligned
from deepseek_trt.export.arrays import Array, numpy_dtype
from deepseek_trt.export.bundle.graph import TensorSpec
from deepseek_trt.export.dtypes import dtype_bytes


def given_inputs(record: PlanRecord) -> tuple[TensorSpec, ...]:
    """The inputs that a caller gives each time: neither weights nor page pools."""
    fixed = set(record.weights)
    return tuple(t for t in record.inputs if t.name not in fixed and not t.name.startswith("past_key_values."))


class Staging:
    """Room for the largest inputs of any of the plans. The same shapes always lie in the same places, which is what
    lets a CUDA graph be used again.
    """

    def __init__(self, device: Device, records: Sequence[PlanRecord]) -> None:
        nbytes = max(sum(map(aligned, _largest(record))) for record in records)
        self._device = device
        self._address = device.allocate(nbytes, "the inputs")
        self._pinned = device.pin(nbytes)
        self._used = 0

    def put(self, inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, int]:
        """Lay the feeds out in pinned memory, as the inputs' dtypes; each one's address on the GPU."""
        addresses, at = {}, 0
        for tensor in inputs:
            array = np.ascontiguousarray(feeds[tensor.name], dtype=numpy_dtype(tensor.dtype))
            addresses[tensor.name] = self._address + at
            self._pinned.array[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
            at += aligned(array.nbytes)
        self._used = at
        return addresses

    def upload(self) -> None:
        """Enqueue the copy of what was put."""
        self._device.upload(self._address, self._pinned.address, self._used)


def _largest(record: PlanRecord) -> list[int]:
    """Bytes of each given input at its profile's largest shape."""
    shapes = record.profile.shapes
    return [int(np.prod(shapes[t.name][2])) * dtype_bytes(t.dtype) for t in given_inputs(record)]
