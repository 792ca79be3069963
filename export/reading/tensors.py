"""StoredTensor: where a tensor's bytes lie, and what an adapter adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie. dtype is ours where we have a name, else safetensors' own (e.g. F8_E4M3).

    `name` is the one in the file. `updates` are added to the numbers whenever they are read: each to as many of its
    rows (leading dims flattened), one update after the other.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    updates: tuple[LowRank, ...] = ()


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
