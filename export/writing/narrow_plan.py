"""Which weights of a plan become narrow: linear layers, routed experts and the head, by the rules of a quantization."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from deepseek_trt.export.bundle.narrow import FORMATS, KEEP, Quantization, Rule
from deepseek_trt.export.bundle.recipes import EXPERTS, Recipe, narrow_pair
from deepseek_trt.export.errors import ConfigError
from deepseek_trt.export.text.wording import shown, some
from deepseek_trt.export.writing.weight_plan import WeightPlan

_LINEAR = (
    r"lm_head|.*\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)"
    r"|.*\.mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj)"
)
NARROWED = re.compile(rf"({_LINEAR})\.weight|.*{re.escape(EXPERTS)}(gate_proj|up_proj|down_proj)")
_STACKS = ("gate_proj", "up_proj", "down_proj")
_WHOLE = "embeddings, routers, norms, biases, kv_b_proj (w_uk, w_uv) and a classifier's score stay whole"


def narrowed(plan: WeightPlan, quantization: Quantization) -> tuple[WeightPlan, tuple[str, ...]]:
    """The plan with codes and scales in the place of the weights that the rules name, and sentences for people.

    ConfigError, naming rule and tensor, where a file's rule names nothing, what stays whole, rows that are no multiple
    of its group, or other formats for the experts of one layer; and where nothing becomes narrow.
    """
    wanted = {recipe.name: rule for recipe in plan.recipes if (rule := _rule_of(recipe.name, quantization))}
    if not quantization.is_preset:
        _check_used(plan, quantization, wanted)
    chosen = {recipe.name: wanted[recipe.name] for recipe in plan.recipes if _fits(recipe, wanted)}
    chosen = {name: rule for name, rule in chosen.items() if _same_in_layer(name, chosen)}
    left = [name for name in wanted if name not in chosen]
    again = [r.name for r in plan.recipes if _is_fp8_already(r, chosen.get(r.name))]
    spared = [r.name for r in plan.recipes if r.name not in wanted and NARROWED.fullmatch(r.name)]
    if left and not quantization.is_preset:
        raise ConfigError(_why_left(left[0], plan, wanted, quantization))
    if not chosen:
        raise ConfigError(f"--quantize {shown(quantization.name)}: no weight has rows of a multiple of 32 numbers")
    recipes = tuple(part for recipe in plan.recipes for part in _parts(recipe, chosen.get(recipe.name)))
    sizes = [sum(recipe.nbytes(plan.dtype) for recipe in some) for some in (plan.recipes, recipes)]
    return dataclasses.replace(plan, recipes=recipes), tuple(_notes(quantization, chosen, left, spared, again, sizes))


def _rule_of(name: str, quantization: Quantization) -> Rule | None:
    """The first that matches a weight that can be narrow."""
    if not NARROWED.fullmatch(name):
        return None
    return next((rule for rule in quantization.rules if fnmatchcase(name, rule.pattern)), None)


def _check_used(plan: WeightPlan, quantization: Quantization, wanted: Mapping[str, Rule]) -> None:
    names = [recipe.name for recipe in plan.recipes]
    for index, rule in enumerate(quantization.rules):
        if any(used is rule for used in wanted.values()):
            continue
        where = f"{shown(quantization.name)}: [{index}].pattern {shown(rule.pattern)}"
        matched = [name for name in names if fnmatchcase(name, rule.pattern)]
        if not matched:
            likely = next((name for name in names if NARROWED.fullmatch(name)), names[0])
            raise ConfigError(f"{where} matches no tensor of the graphs; they are called as {likely} is")
        if any(name in wanted for name in matched):
            raise ConfigError(f"{where} matches only what rules before it match, e.g. {matched[0]}: leave it out")
        raise ConfigError(f"{where} matches only {some(matched[:1])} and the like: {_WHOLE}")


def _fits(recipe: Recipe, wanted: Mapping[str, Rule]) -> bool:
    rule = wanted.get(recipe.name)
    return rule is not None and FORMATS[rule.format].fits(recipe.shape)


def together(name: str) -> tuple[str, ...]:
    """The graph tensors that an op takes with this one: a layer's experts."""
    layer, experts, _ = name.rpartition(EXPERTS)
    return tuple(f"{layer}{experts}{stack}" for stack in _STACKS) if experts else (name,)


def _same_in_layer(name: str, chosen: Mapping[str, Rule]) -> bool:
    """Whether the three stacks of a layer's experts are of one format; one op takes them."""
    rules = [chosen.get(other) for other in together(name)]
    return None not in rules and len({(rule.format, rule.group) for rule in rules if rule}) == 1


def _why_left(name: str, plan: WeightPlan, wanted: Mapping[str, Rule], quantization: Quantization) -> str:
    shape = next(recipe.shape for recipe in plan.recipes if recipe.name == name)
    where = f"{shown(quantization.name)}: {name} {list(shape)}"
    if not FORMATS[wanted[name].format].fits(shape):
        return f"{where} has rows of {shape[-1]} numbers, no multiple of {wanted[name].group}: let no rule match it"
    return f"{where}: gate_proj, up_proj and down_proj of a layer's experts must be narrow alike, in one format"


def _parts(recipe: Recipe, rule: Rule | None) -> tuple[Recipe, ...]:
    return (recipe,) if rule is None else narrow_pair(recipe, rule.format, rule.group, rule.method)


def _is_fp8_already(recipe: Recipe, rule: Rule | None) -> bool:
    return rule is not None and rule.format == "fp8" and any(piece.scale for piece in recipe.pieces)


def _notes(
    quantization: Quantization,
    chosen: Mapping[str, Rule],
    left: list[str],
    spared: list[str],
    again: list[str],
    sizes: list[int],
) -> Iterator[str]:
    counts = Counter((rule.format, rule.method) for rule in chosen.values())
    said = ", ".join(f"{count} weights in {kind} ({method})" for (kind, method), count in sorted(counts.items()))
    whole, narrow = (f"{size / 1e9:,.3g} GB" for size in sizes)
    yield f"--quantize {shown(quantization.name)}: {said}, {narrow} in place of {whole}; {_WHOLE}"
    if again:
        yield f"{len(again)} weights are fp8 already, and rounded anew: --quantize {KEEP} holds their codes as they are"
    if spared:
        yield f"{len(spared)} weights stay whole, as no rule names them: {some(spared)}"
    if left:
        yield f"{len(left)} weights stay whole, as their rows are no multiple of 32 numbers: {some(left[:3])}"
