"""Codes and scales as the numbers that they stand for."""

from __future__ import annotations

import numpy as np

from deepseek_trt.export.arrays import Array, Floats
from deepseek_trt.export.bundle.narrow import FORMATS, Narrow

_ROWS = 4096  # widened at a time: what is computed on the way stays small


def widened(codes: Array, scales: Array, narrow: Narrow) -> Floats:
    """The weight [.., N, K] in float32, each number exact, of its codes and its scales [.., N, K / group]."""
    kind = FORMATS[narrow.format]
    shape = (*codes.shape[:-1], codes.shape[-1] * kind.packed)
    made = np.empty((*scales.shape, narrow.group), dtype=np.float32).reshape(-1, shape[-1])
    flat, steps = codes.reshape(len(made), -1), scales.reshape(len(made), -1)
    for at in range(0, len(made), _ROWS):
        rows = slice(at, at + _ROWS)
        numbers = _unpacked(flat[rows], kind.packed) - kind.bias
        grouped = numbers.astype(np.float32).reshape(len(numbers), -1, narrow.group)
        made[rows] = (grouped * steps[rows, :, None].astype(np.float32)).reshape(len(numbers), -1)
    return made.reshape(shape)


def _unpacked(codes: Array, packed: int) -> Array:
    """One number an element; of a byte the low half comes first."""
    if packed == 1:
        return codes.astype(np.int16)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.int16)
