"""Narrow weights as numbers in float64, after the table of bits in docs/narrow.md and written for this check alone.

Codes are bytes as they are stored, uint8 [.., N, B] with B bytes a row; numbers are [.., N, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = {"int8": 32, "int4": 32, "fp8": 128}  # columns that share a scale
ROWS = {"int8": 1, "int4": 1, "fp8": 128}  # and rows
FP8_NANS = (0x7F, 0xFF)


def numbers_of(format: str, codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times scales: float16 scales of 32 columns of a row each, of fp8 float32 ones of 128 x 128 numbers each."""
    plain = _PLAIN[format](codes)
    *stack, rows, columns = plain.shape
    if scales.shape != (*stack, -(-rows // ROWS[format]), -(-columns // GROUPS[format])):
        raise ValueError(f"scales {tuple(scales.shape)} are not those of numbers {tuple(plain.shape)}")
    wide = scales.double().repeat_interleave(ROWS[format], -2).repeat_interleave(GROUPS[format], -1)
    return plain * wide[..., :rows, :columns]


def plain_numbers(format: str, codes: Tensor) -> Tensor:
    """Of codes, uint8, before their scales."""
    return _PLAIN[format](codes)


def _int8(codes: Tensor) -> Tensor:
    """Two's complement."""
    unsigned = codes.double()
    return unsigned - 256 * (unsigned > 127)


def _int4(codes: Tensor) -> Tensor:
    """Byte j holds number 2j in its lower half and number 2j + 1 in its upper, each with 8 added."""
    import torch

    whole = codes.int()
    return (torch.stack((whole % 16, whole // 16), -1).flatten(-2) - 8).double()


def _fp8(codes: Tensor) -> Tensor:
    """Sign, four bits of exponent, three of mantissa; an exponent of 0 has no leading one."""
    import torch

    whole = codes.int()
    exponent, mantissa = whole // 8 % 16, (whole % 8).double() / 8
    normal = torch.pow(2.0, (exponent - 7).double()) * (1 + mantissa)
    magnitude = torch.where(exponent > 0, normal, 2.0**-6 * mantissa)
    return torch.where(whole >= 128, -magnitude, magnitude)


_PLAIN = {"int8": _int8, "int4": _int4, "fp8": _fp8}


@dataclass(frozen=True)
class NarrowStack:
    """Matrices of all experts, of which one at a time becomes numbers: codes [E, N, B], scales [E, ..]."""

    format: str
    codes: Tensor
    scales: Tensor

    def __getitem__(self, expert: int) -> Tensor:
        """The expert's matrix [N, K] in float64."""
        return numbers_of(self.format, self.codes[expert], self.scales[expert])
