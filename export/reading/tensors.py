"""StoredTensor: where a tensor's bytes lie, and what an adapter adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie. dtype is ours where we have a name, else safetensors' own (e.g. F8_E4M3).

    `name` is the one in the file. `update` is added to the numbers whenever they are read.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    update: LowRank | None = None


@dataclass(frozen=True)
class LowRank:
    """scale * left @ right, in the shape of the weight: left is [rows, r], right [r, columns].

    `transposed` says that both are stored as their transposes, as peft stores those of an embedding.
    """

    left: StoredTensor
    right: StoredTensor
    scale: float
    transposed: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of left and right as they are multiplied."""
        step = -1 if self.transposed else 1
        return self.left.shape[::step], self.right.shape[::step]
