"""Which weights of a packed checkpoint stay narrow in the bundle, in which format, and which become whole numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from deepseek_trt.export.bundle.narrow import GROUP, PUBLISHED, Quantization, Rule
from deepseek_trt.export.bundle.recipes import Recipe, narrow_pair
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.reading.tensors import Packed, StoredTensor
from deepseek_trt.export.text.wording import some
from deepseek_trt.export.writing.narrow_plan import NARROWED, together
from deepseek_trt.export.writing.weight_plan import WeightPlan


def taken(
    plan: WeightPlan, tensors: Mapping[str, StoredTensor], label: str
) -> tuple[WeightPlan, Quantization | None, tuple[str, ...]]:
    """The plan with codes and scales in place of packed weights, what says so of the bundle, and sentences for people.

    Codes of 4 bits that are symmetric become int4, all others int8; what an op takes together is of one format. Where
    graphs take no codes (embeddings, kv_b_proj, rows of no multiple of 32), packed weights become whole numbers.
    CheckpointError naming experts of a layer that are packed beside whole ones.
    """
    packed = {recipe.name: _sources(recipe, tensors) for recipe in plan.recipes}
    packed = {name: sources for name, sources in packed.items() if sources}
    if not packed:
        return plan, None, ()
    _check_alike(plan.recipes, packed, tensors)
    fitting = {r.name for r in plan.recipes if r.name in packed and _fits(r)}
    narrow = {name for name in fitting if all(other in fitting for other in together(name))}
    formats = {name: _format(source for other in together(name) for source in packed[other]) for name in narrow}
    recipes = tuple(part for recipe in plan.recipes for part in _parts(recipe, formats.get(recipe.name)))
    rules = tuple(Rule("*", kind, GROUP, PUBLISHED) for kind in ("int4", "int8") if kind in formats.values())
    whole = [name for name in packed if name not in narrow]
    notes = tuple(_notes(label, formats, packed, whole, plan.dtype))
    quantization = Quantization(label, rules, is_preset=False) if rules else None
    return dataclasses.replace(plan, recipes=recipes), quantization, notes


def _sources(recipe: Recipe, tensors: Mapping[str, StoredTensor]) -> tuple[Packed, ...]:
    """What the recipe's packed pieces are of."""
    found = (tensors[piece.source].packed for piece in recipe.pieces)
    return tuple(packed for packed in found if packed is not None)


def _check_alike(
    recipes: Iterable[Recipe], packed: Mapping[str, tuple[Packed, ...]], tensors: Mapping[str, StoredTensor]
) -> None:
    """All experts of a layer are packed, or none is."""
    names = [r.name for r in recipes]
    for recipe in recipes:
        if recipe.name not in packed:
            continue
        whole = next((p.source for p in recipe.pieces if tensors[p.source].packed is None), None)
        other = next((name for name in together(recipe.name) if name in names and name not in packed), None)
        if whole or other:
            raise CheckpointError(
                f"{recipe.name} is packed ({some([packed[recipe.name][0].codes.name])}), and {whole or other} beside "
                "it is whole: an op takes the experts of a layer together; pack all of them, or none"
            )


def _fits(recipe: Recipe) -> bool:
    return NARROWED.fullmatch(recipe.name) is not None and recipe.shape[-1] % GROUP == 0


def _format(sources: Iterable[Packed]) -> str:
    return "int4" if all(source.is_int4 for source in sources) else "int8"


def _parts(recipe: Recipe, kind: str | None) -> tuple[Recipe, ...]:
    return (recipe,) if kind is None else narrow_pair(recipe, kind, GROUP, PUBLISHED)


def _notes(
    label: str,
    formats: Mapping[str, str],
    packed: Mapping[str, tuple[Packed, ...]],
    whole: list[str],
    dtype: str,
) -> Iterator[str]:
    if formats:
        counts = ", ".join(f"{count} weights in {kind}" for kind, count in sorted(Counter(formats.values()).items()))
        yield f"the checkpoint is packed ({label}), and its codes and scales are taken as they are: {counts}"
    wider = [name for name, kind in formats.items() if kind == "int8" and any(s.bits == 4 for s in packed[name])]
    if wider:
        yield (
            f"{len(wider)} weights of 4 bits are stored in 8, as their zero points are not in the middle or others of "
            f"their layer need it: {some(wider)}"
        )
    if whole:
        yield (
            f"{len(whole)} packed weights are stored as whole numbers, as graphs take no codes there, rounded to the "
            f"dtype of the export ({dtype} unless --dtype says another): {some(whole)}"
        )
