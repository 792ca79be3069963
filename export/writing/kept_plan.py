"""Which fp8 weights of a checkpoint keep their codes and scales in the bundle, and which are dequantised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from deepseek_trt.export.bundle.narrow import BLOCK, KEEP, KEPT, NONE, PUBLISHED, Quantization
from deepseek_trt.export.bundle.recipes import EXPERTS, SCALE_SUFFIX, Piece, Recipe, narrow_pair
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.reading.tensors import StoredTensor
from deepseek_trt.export.text.wording import some
from deepseek_trt.export.writing.narrow_plan import NARROWED, together
from deepseek_trt.export.writing.weight_plan import WeightPlan


def kept(plan: WeightPlan, tensors: Mapping[str, StoredTensor]) -> tuple[WeightPlan, Quantization, tuple[str, ...]]:
    """The plan with codes and scales in the place of fp8 weights, what says so of the bundle, and sentences for people.

    Linear layers and stacks of experts are kept whose tensors are fp8 and lie in the graphs as in the checkpoint; other
    fp8 weights are dequantised. ConfigError where nothing can be kept, or where an adapter changes what would be.
    """
    fp8, names = _fp8(plan), _kept_names(plan, tensors)
    if not names:
        what = f"of the {len(fp8)} fp8 weights none can be" if fp8 else f"no weight is fp8 with *{SCALE_SUFFIX}, to be"
        raise ConfigError(f"--quantize {KEEP}: {what} kept as it is stored: leave it out, or say which format to make")
    _check_unchanged([recipe for recipe in plan.recipes if recipe.name in names], tensors)
    recipes = tuple(part for recipe in plan.recipes for part in _parts(recipe, recipe.name in names))
    notes = tuple(_notes(names, [name for name in fp8 if name not in names], plan.dtype))
    return dataclasses.replace(plan, recipes=recipes), KEPT, notes


def kept_if_any(
    plan: WeightPlan, tensors: Mapping[str, StoredTensor]
) -> tuple[WeightPlan, Quantization | None, tuple[str, ...]]:
    """As `kept`, of an export that does not say what to narrow: with no fp8 to keep, the plan as it is."""
    return kept(plan, tensors) if _kept_names(plan, tensors) else (plan, None, ())


def _fp8(plan: WeightPlan) -> list[str]:
    return [recipe.name for recipe in plan.recipes if any(piece.scale for piece in recipe.pieces)]


def _kept_names(plan: WeightPlan, tensors: Mapping[str, StoredTensor]) -> set[str]:
    fitting = {recipe.name for recipe in plan.recipes if _fits(recipe, tensors)}
    return {name for name in fitting if all(other in fitting for other in together(name))}


def _fits(recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> bool:
    return NARROWED.fullmatch(recipe.name) is not None and all(_is_whole(piece, tensors) for piece in recipe.pieces)


def _is_whole(piece: Piece, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether it is all rows of an fp8 matrix in their order: blocks of scales are of neighbours."""
    rows = math.prod(tensors[piece.source].shape[:-1])
    return piece.scale is not None and not piece.halves and (piece.start, piece.rows, piece.times) == (0, rows, 1)


def _check_unchanged(recipes: list[Recipe], tensors: Mapping[str, StoredTensor]) -> None:
    changed = [recipe.name for recipe in recipes if any(tensors[piece.source].updates for piece in recipe.pieces)]
    if changed:
        raise ConfigError(
            f"--quantize {KEEP} and --adapter: sums with kept codes would be rounded anew, and the adapter changes "
            f"{len(changed)} weights that would be kept: {some(changed)}; leave out --quantize {KEEP}, or take "
            "--quantize fp8, which narrows the sums"
        )


def _parts(recipe: Recipe, is_kept: bool) -> tuple[Recipe, ...]:
    return narrow_pair(recipe, "fp8", BLOCK, PUBLISHED) if is_kept else (recipe,)


def _notes(names: set[str], left: list[str], dtype: str) -> Iterator[str]:
    stacks = sum(EXPERTS in name for name in names)
    yield (
        f"--quantize {KEEP}: {len(names)} weights ({stacks} of them stacks of experts) hold the checkpoint's fp8 codes "
        f"and scales as they are; --quantize {NONE} dequantises them"
    )
    if left:
        yield (
            f"{len(left)} fp8 weights are dequantised, as graphs take no codes there, and rounded to the dtype of the "
            f"export ({dtype} unless --dtype says another): {some(left)}"
        )
