"""Numbers: NaN, infinities and zeros in weights, counted while a chunk of them is at hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from deepseek_trt.export.arrays import Array
from deepseek_trt.export.bundle.recipes import Piece, Recipe
from deepseek_trt.export.reading.tensors import StoredTensor

_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # its bits; those of NaN are larger


@dataclass(frozen=True)
class Numbers:
    """What was seen of one checkpoint tensor: NaN and infinities, finite numbers that a narrower dtype made infinite.

    `zeros` counts the numbers of chunks that hold nothing but zeros: all of a tensor's where it is zeros alone.
    """

    source: str
    nonfinite: int = 0
    zeros: int = 0
    overflows: int = 0

    def __add__(self, other: Numbers) -> Numbers:
        counts = {name: getattr(self, name) + getattr(other, name) for name in ("nonfinite", "zeros", "overflows")}
        return replace(self, **counts)


def look(chunk: Array) -> tuple[int, bool]:
    """How many numbers of a float array are NaN or infinite, and whether it is zeros alone."""
    infinity, sign = _INFINITY[chunk.dtype.name], 1 << (8 * chunk.itemsize - 1)
    bits = chunk.view(f"u{chunk.itemsize}")
    # read as signed integers the largest is the largest number; read as unsigned ones it is the most negative number
    most, least = int(bits.view(f"i{chunk.itemsize}").max(initial=-sign)), int(bits.max(initial=0))
    is_finite = most < infinity and least < sign + infinity
    return 0 if is_finite else int(((bits & (sign - 1)) >= infinity).sum()), most <= 0 and least <= sign


def may_be_zero(name: str) -> bool:
    """Whether training may leave the tensor at zero: a bias. Matrices and norms of zeros are no such thing."""
    return name.endswith("bias")


def sizes_of(recipes: Iterable[Recipe], tensors: Mapping[str, StoredTensor]) -> Counter[str]:
    """Numbers that all recipes take of each checkpoint tensor."""
    sizes: Counter[str] = Counter()
    for recipe in recipes:
        for piece in recipe.pieces:
            sizes[piece.source] += _size(piece, tensors)
    return sizes


def _size(piece: Piece, tensors: Mapping[str, StoredTensor]) -> int:
    return piece.rows * piece.times * tensors[piece.source].shape[-1]


class Tally:
    """Counts by checkpoint tensor while the chunks of a recipe pass, in order; no chunk is of two pieces."""

    def __init__(self, recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> None:
        self._names = [piece.source for piece in recipe.pieces]
        self._ends = list(itertools.accumulate(_size(piece, tensors) for piece in recipe.pieces))
        self._at, self._piece = 0, 0
        self._seen: dict[str, Numbers] = {}

    def add(self, chunk: Array, converted: Array | None = None) -> None:
        """The next chunk, and what became of it in another dtype."""
        nonfinite, is_zero = look(chunk)
        self.count(chunk.size, nonfinite, is_zero, 0 if converted is None else look(converted)[0] - nonfinite)

    def count(self, size: int, nonfinite: int, is_zero: bool, overflows: int = 0) -> None:
        """What was seen of the next `size` numbers."""
        while self._at >= self._ends[self._piece]:
            self._piece += 1
        self._at += size
        if nonfinite or is_zero or overflows:
            name = self._names[self._piece]
            more = Numbers(name, nonfinite, size if is_zero else 0, overflows)
            self._seen[name] = self._seen.get(name, Numbers(name)) + more

    @property
    def is_finite(self) -> bool:
        """Whether all numbers so far were."""
        return not any(numbers.nonfinite for numbers in self._seen.values())

    @property
    def odd(self) -> tuple[Numbers, ...]:
        """The tensors of which something is to be said."""
        return tuple(self._seen.values())
