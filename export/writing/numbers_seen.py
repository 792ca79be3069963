"""What is said of the numbers that export saw: what refuses a checkpoint, and what is only noted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deepseek_trt.export.bundle.recipes import Recipe
from deepseek_trt.export.errors import CheckpointError
from deepseek_trt.export.numbers import Numbers, may_be_zero, sizes_of
from deepseek_trt.export.reading.tensors import StoredTensor

_MOST_NAMED = 5


@dataclass(frozen=True)
class Allowed:
    """What a user has looked at and wants to export all the same."""

    nonfinite: bool = False
    zeros: bool = False


def judge_numbers(
    seen: Iterable[Numbers],
    recipes: tuple[Recipe, ...],
    tensors: Mapping[str, StoredTensor],
    dtype: str,
    allowed: Allowed,
) -> tuple[str, ...]:
    """Sentences for the manifest. Raises CheckpointError for numbers that are not finite and for tensors of zeros alone
    unless they are allowed, and for finite numbers that `dtype` cannot hold.
    """
    found: dict[str, Numbers] = {}
    for one in seen:  # a tensor may have gone into several graph tensors
        found[one.source] = found[one.source] + one if one.source in found else one
    sizes = sizes_of(recipes, tensors)
    empty = [n for n in found.values() if n.zeros == sizes[n.source] and not may_be_zero(n.source)]
    broken = [n for n in found.values() if n.nonfinite]
    notes = []
    if broken:
        notes += _refused_unless(allowed.nonfinite, "--allow-nonfinite", _nonfinite(broken, tensors))
    if empty:
        notes += _refused_unless(allowed.zeros, "--allow-zeros", _empty(empty, tensors))
    lost = [n for n in found.values() if n.overflows]
    if lost:
        wider = "bfloat16" if dtype == "float16" else "float32"
        counts = _named([f"{n.source} ({n.overflows})" for n in lost])
        total = sum(n.overflows for n in lost)
        raise CheckpointError(f"{total} weights overflow {dtype}: {counts}; use --dtype {wider}")
    partly = [n for n in found.values() if 0 < n.zeros < sizes[n.source]]
    if partly:
        shares = _named([f"{n.source} ({n.zeros / sizes[n.source]:.0%})" for n in partly])
        notes.append(f"long runs of zeros in {len(partly)} tensors: {shares}")
    return tuple(notes)


def _refused_unless(allowed: bool, option: str, sentence: str) -> list[str]:
    if not allowed:
        raise CheckpointError(f"{sentence}; download what holds them again, or export them as they are with {option}")
    return [f"{option}: {sentence}"]


def _nonfinite(broken: list[Numbers], tensors: Mapping[str, StoredTensor]) -> str:
    total, counts = sum(n.nonfinite for n in broken), _named([f"{n.source} ({n.nonfinite})" for n in broken])
    where = f"in {len(broken)} tensors of {_files(broken, tensors)}"
    return f"{total} weights are NaN or infinite, {where}: {counts}"


def _empty(empty: list[Numbers], tensors: Mapping[str, StoredTensor]) -> str:
    return f"{len(empty)} tensors of {_files(empty, tensors)} hold zeros alone: {_named([n.source for n in empty])}"


def _files(numbers: list[Numbers], tensors: Mapping[str, StoredTensor]) -> str:
    return _named(sorted({tensors[n.source].file.name for n in numbers}))


def _named(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
