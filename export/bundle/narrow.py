"""Narrow weights: formats of codes and scales by name, and how a graph tensor says that it is a part of one.

A matrix [.., N, K], or a stack of them, becomes codes and scales, each of a group of numbers along K or of a block: a
number is float32(code) * float32(scale). docs/narrow.md has the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GROUP = 32  # numbers along K that share a scale, of whole numbers
BLOCK = 128  # rows and columns that share a scale, of fp8
SCALE = "_scale"  # what the name of the scales adds to that of the codes
CODES: Literal["codes"] = "codes"
SCALES: Literal["scales"] = "scales"
SCALE_DTYPE = "float16"  # of whole numbers
ABSMAX, LEAST_SQUARES = "absmax", "least_squares"  # methods that find scales
PUBLISHED: Literal["published"] = "published"  # codes and scales are the checkpoint's
KEEP = "keep"  # what --quantize calls the checkpoint's own codes
NONE = "none"  # and weights that are all whole


@dataclass(frozen=True)
class Format:
    """Codes are numbers from `least` to `most`; `packed` of them share one element of the dtype.

    A scale is of `rows` x `group` numbers. What has groups of one row alone needs whole ones; the last blocks of a
    matrix may be smaller. `methods` find scales, the usual one first.
    """

    name: str
    dtype: str
    packed: int
    least: int
    most: int
    methods: tuple[str, ...] = (ABSMAX, LEAST_SQUARES)
    group: int = GROUP
    rows: int = 1
    scale_dtype: str = SCALE_DTYPE

    @property
    def bias(self) -> int:
        """What is added to a code before it is packed, so that it is not negative."""
        return -self.least if self.packed > 1 else 0

    @property
    def is_blocks(self) -> bool:
        """Whether rows share scales; codes are floats then, and products take tokens as they are."""
        return self.rows > 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight [.., N, K] can have codes."""
        return self.is_blocks or shape[-1] % self.group == 0


FORMATS = {
    made.name: made
    for made in (
        Format("int8", "int8", 1, -127, 127),
        # of a byte the low half is the earlier number
        Format("int4", "uint8", 2, -8, 7, methods=(LEAST_SQUARES, ABSMAX)),
        Format("fp8", "float8_e4m3fn", 1, -448, 448, (ABSMAX,), BLOCK, BLOCK, "float32"),
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
        kind = FORMATS[self.format]
        return kind.dtype if self.part == CODES else kind.scale_dtype

    @property
    def numbers(self) -> int:
        """Of the model's numbers, those that one element of this part holds; scales are none of them."""
        return FORMATS[self.format].packed if self.part == CODES else 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of this part of a weight [.., N, K]."""
        kind, (*stack, rows, columns) = FORMATS[self.format], whole
        if self.part == CODES:
            return (*stack, rows, columns // kind.packed)
        return (*stack, -(-rows // kind.rows), -(-columns // self.group))


@dataclass(frozen=True)
class Rule:
    """Weights whose name `pattern` matches, as fnmatch does, are stored in this format."""

    pattern: str
    format: Literal["int8", "int4", "fp8"]
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

    @property
    def is_packed(self) -> bool:
        """Whether the checkpoint has codes that only we read as whole numbers; fp8 others dequantise and round."""
        return self.is_published and self.name != KEEP


PRESETS = {
    made.name: made
    for made in (
        Quantization("int8", (Rule("*", "int8", GROUP, "absmax"),)),
        Quantization(
            "int4", (Rule("*.mlp.experts.*", "int4", GROUP, "least_squares"), Rule("*", "int8", GROUP, "absmax"))
        ),
        Quantization("fp8", (Rule("model.*", "fp8", BLOCK, "absmax"),)),  # the head stays whole, as in DeepSeek-V3
    )
}
KEPT = Quantization(KEEP, (Rule("*", "fp8", BLOCK, PUBLISHED),), is_preset=False)
