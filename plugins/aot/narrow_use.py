"""Which kernels over narrow weights and a narrow cache a bundle needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.export.bundle.recipes import EXPERTS, Recipe
from deepseek_trt.plugins.kernels.narrow.constants import linear_unit
from deepseek_trt.plugins.kernels.narrow.formats import KERNEL_FORMATS


@dataclass(frozen=True)
class NarrowUse:
    """Formats of a model's weights, in order: of linear layers each with what its columns are multiples of.

    `whole_experts`: whether there is a layer whose experts are whole. `cache`: None where it is whole.
    """

    linear: tuple[tuple[str, int], ...] = ()
    experts: tuple[str, ...] = ()
    whole_experts: bool = True
    cache: NarrowCache | None = None


ALL_WHOLE = NarrowUse()


def narrow_use(recipes: Iterable[Recipe], cache: NarrowCache | None = None) -> NarrowUse:
    """That of a bundle's tensors and its cache."""
    columns: dict[str, list[int]] = {}
    experts: dict[str, None] = {}
    whole = False
    for recipe in recipes:
        if recipe.is_scales:
            continue
        stacked = EXPERTS in recipe.name
        if recipe.narrow is None:
            whole |= stacked
        elif stacked:
            experts[recipe.narrow.format] = None
        else:
            columns.setdefault(recipe.narrow.format, []).append(recipe.whole_shape[-1])
    linear = tuple((format, linear_unit(KERNEL_FORMATS[format], of)) for format, of in sorted(columns.items()))
    return NarrowUse(linear, tuple(sorted(experts)), whole or not experts, cache)
