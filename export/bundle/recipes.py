"""Recipes: of which checkpoint tensors a graph tensor is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek_trt.export.config.limits import TENSORRT_MOST_NUMBERS
from deepseek_trt.export.dtypes import dtype_bytes

EMBEDDINGS, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
CORRECTION_BIAS = "e_score_correction_bias"
SCALE_SUFFIX = "_scale_inv"  # weight_scale_inv [ceil(rows/128), ceil(columns/128)] beside an fp8 weight
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class Piece:
    """Strips of rows of one checkpoint tensor, its leading dims flattened: `times` strips of `rows`, `step` apart.

    `scale` names the tensor that holds an fp8 source's block scales. The last `halves` rows of each strip are stored as
    two halves, and are read as pairs of one row of each: rows that rotate together come to lie side by side. Where such
    a piece is of a one-dimensional tensor, its rows are single numbers.
    """

    source: str
    start: int
    rows: int
    step: int
    times: int
    scale: str | None = None
    halves: int = 0

    def strips(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of what lies together, in the order in which it is read; strips that touch are one."""
        if self.step == self.rows and not self.halves:
            yield self.start, self.rows * self.times
            return
        for i in range(self.times):
            first, plain = self.start + i * self.step, self.rows - self.halves
            if plain:
                yield first, plain
            for row in range(first + plain, first + plain + self.halves // 2):
                yield row, 1
                yield row + self.halves // 2, 1


@dataclass(frozen=True)
class Recipe:
    """One graph tensor: its name, its shape, and the pieces that lie one after the other in it."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def dtype(self, model: str) -> str:
        """The dtype that graphs of a `model` dtype hold this tensor in."""
        return "float32" if self.name.endswith(CORRECTION_BIAS) else model

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, model: str) -> int:
        """Bytes of this tensor in graphs of a `model` dtype."""
        return self.size * dtype_bytes(self.dtype(model))


@dataclass(frozen=True)
class Dropped:
    """A checkpoint tensor that no graph needs, and why."""

    name: str
    reason: str


def too_large_for_tensorrt(recipes: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """The graph tensors that TensorRT cannot hold; V2 has none, V3's stacked experts are."""
    return tuple(recipe for recipe in recipes if recipe.size > TENSORRT_MOST_NUMBERS)
