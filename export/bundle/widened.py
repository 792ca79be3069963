"""Codes and scales as the numbers that they stand for."""

from __future__ import annotations

import numpy as np

from deepseek_trt.export.arrays import E4M3, Array, Floats
from deepseek_trt.export.bundle.narrow import FORMATS, Format, Narrow

_ROWS = 4096  # widened at a time: what is computed on the way stays small


def widened(codes: Array, scales: Array, narrow: Narrow) -> Floats:
    """The weight [.., N, K] in float32 of its codes and its scales; of whole numbers each is exact, of fp8 rounded."""
    kind = FORMATS[narrow.format]
    if kind.is_blocks:
        return _of_blocks(codes, scales, kind)
    shape = (*codes.shape[:-1], codes.shape[-1] * kind.packed)
    made = np.empty((*scales.shape, narrow.group), dtype=np.float32).reshape(-1, shape[-1])
    flat, steps = codes.reshape(len(made), -1), scales.reshape(len(made), -1)
    for at in range(0, len(made), _ROWS):
        rows = slice(at, at + _ROWS)
        numbers = _unpacked(flat[rows], kind.packed) - kind.bias
        grouped = numbers.astype(np.float32).reshape(len(numbers), -1, narrow.group)
        made[rows] = (grouped * steps[rows, :, None].astype(np.float32)).reshape(len(numbers), -1)
    return made.reshape(shape)


def widened_block(codes: Array, scales: Array) -> Floats:
    """Rows [n, K] that share scales [ceil(K / 128)], of fp8 codes as bytes, in float32."""
    kind, columns = FORMATS["fp8"], codes.shape[-1]
    with np.errstate(invalid="ignore", over="ignore"):  # export and validate say what is not finite
        made: Floats = E4M3[codes] * np.repeat(scales, kind.group)[:columns]
    return made


def _of_blocks(codes: Array, scales: Array, kind: Format) -> Floats:
    made = np.empty(codes.shape, dtype=np.float32)
    matrix, steps = codes.shape[-2:], scales.shape[-2:]
    for to, of, by in zip(
        made.reshape(-1, *matrix), codes.reshape(-1, *matrix), scales.reshape(-1, *steps), strict=True
    ):
        for block, step in enumerate(by):
            rows = slice(block * kind.rows, (block + 1) * kind.rows)
            to[rows] = widened_block(of[rows], step)
    return made


def _unpacked(codes: Array, packed: int) -> Array:
    """One number an element; of a byte the low half comes first."""
    if packed == 1:
        return codes.astype(np.int16)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.int16)
