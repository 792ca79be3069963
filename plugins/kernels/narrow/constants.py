"""The constants that the kernels over narrow weights take from the model's dimensions, tiles apart. No Triton here."""

from __future__ import annotations

import math
from collections.abc import Iterable

from deepseek_trt.plugins.kernels.constants import Constants, ExpertsConstants, experts_constants
from deepseek_trt.plugins.kernels.narrow.formats import KernelFormat


def linear_unit(kind: KernelFormat, columns: Iterable[int]) -> int:
    """What the columns of all matrices of one format are multiples of: known when kernels are compiled, it lets them
    load many bytes at a time. Of whole numbers it is a group.
    """
    return math.gcd(kind.group, *columns)


def linear_constants(kind: KernelFormat, unit: int) -> Constants:
    """Constants of linear_narrow; rows and columns are given at launch."""
    return {"FORMAT": kind.code, "GROUP": kind.group, "UNIT": unit}


def narrow_experts_constants(kind: KernelFormat, hidden: int, inter: int, top_k: int) -> ExpertsConstants:
    """Constants of moe_gate_up_narrow, moe_down_narrow and moe_combine."""
    whole, narrow = experts_constants(hidden, inter, top_k), {"FORMAT": kind.code, "GROUP": kind.group}
    return ExpertsConstants({**whole.gate_up, **narrow}, {**whole.down, **narrow}, whole.combine)
