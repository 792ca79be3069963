"""StoredTensor: where a tensor's bytes lie, what they are unpacked with, and what an adapter adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PACKED = "packed"  # the dtype of a tensor whose numbers are made of others
Layout = Literal["rows", "columns", "awq"]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie. dtype is ours where we have a name, else safetensors' own (e.g. F8_E4M3).

    `name` is the one in the file. Where `packed` says so, that one holds codes, and `shape` is the shape of the weight
    that they are of, with others. `updates` are added to the numbers whenever they are read: each to as many of its
    rows (leading dims flattened), one update after the other.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    updates: tuple[LowRank, ...] = ()
    packed: Packed | None = None


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] of which `group` numbers of a row share a scale, and a zero point: (code - zero point) * scale.

    Codes are of 4 or 8 `bits`. Layouts: "rows" as compressed-tensors has them, codes along K in one integer, scales
    [N, G]; "columns" as GPTQ, the same transposed, zero points along N; "awq" as AutoAWQ's gemm, codes and zero points
    along N in an order of its own. Zero points are stored with `less` taken away; where there are none, or where they
    are said to be `symmetric`, they are half of what a code can be. `order` is the group of each of the K columns.
    """

    layout: Layout
    bits: int
    group: int
    symmetric: bool
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None = None
    shape: StoredTensor | None = None
    order: StoredTensor | None = None
    less: int = 0

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        every = (self.codes, self.scales, self.zeros, self.shape, self.order)
        return tuple(part for part in every if part is not None)

    @property
    def is_int4(self) -> bool:
        """Whether codes of 4 bits hold the numbers as they are."""
        return self.bits == 4 and self.symmetric


@dataclass(frozen=True)
class Factor:
    """A matrix that is part of a stored one: its rows and columns (None: all), then transposed if so said."""

    tensor: StoredTensor
    rows: range | None = None
    columns: range | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the part as it is multiplied."""
        parts = zip(self.tensor.shape, (self.rows, self.columns), strict=True)
        rows, columns = (size if part is None else len(part) for size, part in parts)
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class LowRank:
    """scale * left [rows, r] @ right [r, columns]."""

    left: Factor
    right: Factor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.left.shape[0], self.right.shape[1]
