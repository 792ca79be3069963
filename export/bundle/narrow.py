"""Narrow weights: formats of codes and scales by name, and how a graph tensor says that it is a part of one.

A matrix [.., N, K], or a stack of them, becomes codes and a float16 scale for each group of numbers along K: a number
is float32(code) * float32(scale). docs/narrow.md has the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_NARROW_ENGINES = "TensorRT does not take narrow weights yet: run the bundle with ort, or export whole weights"
GROUP = 32  # numbers along K that share a scale
SCALE = "_scale"  # what the name of the scales adds to that of the codes
SCALE_DTYPE = "float16"
CODES: Literal["codes"] = "codes"
SCALES: Literal["scales"] = "scales"
ABSMAX, LEAST_SQUARES = "absmax", "least_squares"  # methods that find scales
PUBLISHED: Literal["published"] = "published"  # codes and scales are the checkpoint's


@dataclass(frozen=True)
class Format:
    """Codes are whole numbers from `least` to `most`; `packed` of them share one element of the dtype."""

    name: str
    dtype: str
    packed: int
    least: int
    most: int

    @property
    def bias(self) -> int:
        """What is added to a code before it is packed, so that it is not negative."""
        return -self.least if self.packed > 1 else 0


FORMATS = {
    made.name: made
    for made in (
        Format("int8", "int8", 1, -127, 127),
        Format("int4", "uint8", 2, -8, 7),  # of a byte the low half is the earlier number
    )
}


@dataclass(frozen=True)
class Narrow:
    """A graph tensor is one part of a narrow weight: its codes or its scales; `method` is how scales were found."""

    format: str
    group: int
    method: str
    part: Literal["codes", "scales"]

    @property
    def dtype(self) -> str:
        return FORMATS[self.format].dtype if self.part == CODES else SCALE_DTYPE

    @property
    def numbers(self) -> int:
        """Of the model's numbers, those that one element of this part holds; scales are none of them."""
        return FORMATS[self.format].packed if self.part == CODES else 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of this part of a weight [.., N, K]."""
        each = FORMATS[self.format].packed if self.part == CODES else self.group
        return (*whole[:-1], whole[-1] // each)


@dataclass(frozen=True)
class Rule:
    """Weights whose name `pattern` matches, as fnmatch does, are stored in this format."""

    pattern: str
    format: Literal["int8", "int4"]
    group: int
    method: Literal["absmax", "least_squares", "published"]


@dataclass(frozen=True)
class Quantization:
    """What an export narrows: of a weight's rules the first that matches holds.

    `name` is a preset's, a file's, or what people call the packing that a checkpoint is published in.
    """

    name: str
    rules: tuple[Rule, ...]
    is_preset: bool = True

    @property
    def is_published(self) -> bool:
        """Whether codes and scales are the checkpoint's own."""
        return any(rule.method == PUBLISHED for rule in self.rules)


PRESETS = {
    made.name: made
    for made in (
        Quantization("int8", (Rule("*", "int8", GROUP, "absmax"),)),
        Quantization(
            "int4", (Rule("*.mlp.experts.*", "int4", GROUP, "least_squares"), Rule("*", "int8", GROUP, "absmax"))
        ),
    )
}
