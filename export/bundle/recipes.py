"""Recipes: of which checkpoint tensors a graph tensor is made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek_trt.export.bundle.narrow import CODES, SCALE, SCALES, Narrow
from deepseek_trt.export.config.limits import TENSORRT_MOST_NUMBERS
from deepseek_trt.export.dtypes import dtype_bytes

EMBEDDINGS, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
CORRECTION_BIAS = "e_score_correction_bias"
SCALE_SUFFIX = "_scale_inv"  # weight_scale_inv [ceil(rows/128), ceil(columns/128)] beside an fp8 weight
FP8 = "F8_E4M3"
EXPERTS = ".mlp.experts."  # in the names of stacked experts
_PART_NUMBERS = 128


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
    """One graph tensor: its name, its shape, and the pieces that lie one after the other in it.

    Where it is part of a narrow weight, `narrow` says which: codes are made of the pieces, and scales with them.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    narrow: Narrow | None = None

    def dtype(self, model: str) -> str:
        """The dtype that graphs of a `model` dtype hold this tensor in."""
        if self.narrow is not None:
            return self.narrow.dtype
        return "float32" if self.name.endswith(CORRECTION_BIAS) else model

    @property
    def size(self) -> int:
        """Elements as they are stored."""
        return math.prod(self.shape)

    @property
    def numbers(self) -> int:
        """Of the model's numbers, those that it holds."""
        return self.size * (1 if self.narrow is None else self.narrow.numbers)

    @property
    def is_scales(self) -> bool:
        return self.narrow is not None and self.narrow.part == SCALES

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the weight that codes are of; of any other tensor its own."""
        each = 1 if self.narrow is None or self.is_scales else self.narrow.numbers
        return (*self.shape[:-1], self.shape[-1] * each)

    def nbytes(self, model: str) -> int:
        """Bytes of this tensor in graphs of a `model` dtype."""
        return self.size * dtype_bytes(self.dtype(model))


def narrow_pair(whole: Recipe, format: str, group: int, method: str) -> tuple[Recipe, Recipe]:
    """The scales and the codes that take the place of a weight, in the order in which files hold them."""
    scales, codes = (Narrow(format, group, method, part) for part in (SCALES, CODES))
    return (
        Recipe(f"{whole.name}{SCALE}", scales.shape(whole.shape), (), scales),
        Recipe(whole.name, codes.shape(whole.shape), whole.pieces, codes),
    )


@dataclass(frozen=True)
class Dropped:
    """A checkpoint tensor that no graph needs, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Part:
    """What TensorRT is given of a graph tensor: some of its rows, from row `start` of the first dim on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0


def split_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of the first dim in each part that TensorRT takes, as few and as alike as can be; none where a row is too
    large. V2's stacked experts are one part, V3's [256, 2048, 7168] two, Kimi-K2's [384, 2048, 7168] three.

    Parts begin at multiples of 128 numbers: TensorRT binds addresses that are multiples of 256 bytes.
    """
    rows, row = shape[0], math.prod(shape[1:])
    if rows * row <= TENSORRT_MOST_NUMBERS:
        return (rows,)
    step = _PART_NUMBERS // math.gcd(row, _PART_NUMBERS)
    most = TENSORRT_MOST_NUMBERS // row // step * step
    if not most:
        return ()
    parts = -(-rows // most)
    each = -(-rows // (parts * step)) * step
    return tuple(min(each, rows - start) for start in range(0, rows, each))


def tensorrt_parts(recipe: Recipe) -> tuple[Part, ...]:
    """The graph inputs that TensorRT takes the tensor as: itself, or parts of a stack of experts; none where it cannot.

    Parts lie one after the other in memory, as the tensor does: the plugin checks that, and takes them for one.
    """
    if recipe.size <= TENSORRT_MOST_NUMBERS:
        return (Part(recipe.name, recipe.shape),)
    counts = split_rows(recipe.shape) if EXPERTS in recipe.name else ()
    starts = itertools.accumulate(counts, initial=0)
    return tuple(
        Part(f"{recipe.name}.part{i}", (count, *recipe.shape[1:]), start)
        for i, (count, start) in enumerate(zip(counts, starts, strict=False))
    )


def too_large_for_tensorrt(recipes: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """The graph tensors that TensorRT cannot hold, not even in parts; the published models have none."""
    return tuple(recipe for recipe in recipes if not tensorrt_parts(recipe))
