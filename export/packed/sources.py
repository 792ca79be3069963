"""Packed weights among a checkpoint's tensors: each becomes one tensor of the shape of its weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepseek_trt.export.dtypes import WEIGHT_DTYPES
from deepseek_trt.export.errors import CheckpointError, ConfigError
from deepseek_trt.export.packed.patterns import Pattern, try_patterns
from deepseek_trt.export.packed.settings import PackedSettings, Scheme
from deepseek_trt.export.reading.checkpoint import Checkpoint
from deepseek_trt.export.reading.tensors import PACKED, Packed, StoredTensor
from deepseek_trt.export.text.wording import some

_AGAIN = "download config.json and the shards again from the same place"
_WORD = 32  # bits of an integer that holds several codes
_BYTES = ("I8",)
_WORDS = ("I32",)
_SCALES = tuple(WEIGHT_DTYPES.values())
_PARTS = {  # endings of the tensors beside the codes: scales, zero points, shape, the columns' groups
    "qweight": ("scales", "qzeros", None, "g_idx"),
    "weight_packed": ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "weight": ("weight_scale", "weight_zero_point", None, "weight_g_idx"),
}


def with_packed(checkpoint: Checkpoint, settings: PackedSettings) -> Checkpoint:
    """The checkpoint with a tensor NAME.weight for each packed weight, in place of what it is packed in.

    Raises CheckpointError naming a tensor that is missing, or is not as the settings say; ConfigError for a pattern
    that cannot be used.
    """
    modules = _modules(checkpoint.tensors)
    try_patterns([*settings.whole, *(p for scheme in settings.schemes for p in scheme.targets)], modules)
    tensors, unindexed = dict(checkpoint.tensors), set(checkpoint.unindexed)
    made = {}
    for module, stored in _packed(checkpoint.tensors, settings):
        made[module] = _weight(module, _scheme(module, stored, settings), tensors)
        if f"{module}.{stored}" in checkpoint.unindexed:
            unindexed.add(f"{module}.weight")
    if made:
        _check_left(tensors)
    tensors |= {f"{module}.weight": weight for module, weight in made.items()}
    notes = (*checkpoint.notes, *_contradictions(modules, made, settings)) if made else checkpoint.notes
    return dataclasses.replace(
        checkpoint, tensors=tensors, unindexed=frozenset(unindexed & tensors.keys()), notes=notes
    )


def _packed(tensors: Mapping[str, StoredTensor], settings: PackedSettings) -> Iterator[tuple[str, str]]:
    """Modules whose codes are there, and the ending of their tensor."""
    endings = dict.fromkeys(scheme.stored for scheme in settings.schemes)
    for name, tensor in tensors.items():
        module, _, ending = name.rpartition(".")
        if ending in endings and (ending != "weight" or tensor.dtype in _BYTES):
            yield module, ending


def _check_left(tensors: Mapping[str, StoredTensor]) -> None:
    """CheckpointError for a part of a packed weight without its codes."""
    parts = {part for parts in _PARTS.values() for part in parts if part} | _PARTS.keys() - {"weight"}
    left = next((name for name in tensors if name.rpartition(".")[2] in parts), None)
    if left is not None:
        raise CheckpointError(
            f"tensor {some([left])} is part of a packed weight, and of none that quantization_config describes: "
            f"{_AGAIN}"
        )


def _modules(tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Names of all that has a weight, whole or packed."""
    names = (name.rpartition(".") for name in tensors)
    return tuple(dict.fromkeys(module for module, _, ending in names if ending in _PARTS))


def _scheme(module: str, stored: str, settings: PackedSettings) -> Scheme:
    """That of the most particular target that names the module; the only one where none does.

    Of several as particular the first by the alphabet holds, and of the same one in two groups the last (the library's
    match_targets and target_to_scheme).
    """
    of_kind = [scheme for scheme in settings.schemes if scheme.stored == stored]
    found = [(p.rank, p.text, -i) for i, scheme in enumerate(of_kind) for p in scheme.targets if p.matches(module)]
    if not found and len(of_kind) > 1:
        raise ConfigError(
            f"tensor {some([f'{module}.{stored}'])} is packed, and no target of quantization_config names its module: "
            "which of its groups it is of, nobody can say; download config.json again"
        )
    return of_kind[-min(found)[2] if found else 0]


def _weight(module: str, scheme: Scheme, tensors: dict[str, StoredTensor]) -> StoredTensor:
    """Take the parts of a packed weight out of `tensors`."""
    codes = tensors.pop(f"{module}.{scheme.stored}")
    if f"{module}.weight" in tensors:
        raise CheckpointError(f"tensors {some([codes.name])} and {some([module])}.weight are both there: remove one")
    dtypes = _BYTES if scheme.stored == "weight" else _WORDS
    if codes.dtype not in dtypes or len(codes.shape) != 2 or 0 in codes.shape:
        raise _unlike(codes, dtypes, "a matrix")
    rows, columns = _shape(codes, scheme)
    group = columns if scheme.group is None else scheme.group
    expected = _Expected(module, scheme, rows, columns, -(-columns // group), tensors)
    scales, zeros, shape, order = _PARTS[scheme.stored]
    packed = Packed(
        layout=scheme.layout,
        bits=scheme.bits,
        group=group,
        symmetric=scheme.symmetric,
        codes=codes,
        scales=expected.take(scales, _SCALES, expected.of_scales),
        zeros=expected.zeros(zeros),
        shape=expected.take(shape, ("I64", "I32"), (2,)) if shape else None,
        order=expected.order(order),
        less=scheme.less,
    )
    size = sum(part.nbytes for part in packed.parts)
    return StoredTensor(codes.name, codes.file, PACKED, (rows, columns), codes.offset, size, packed=packed)


def _shape(codes: StoredTensor, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns of the weight that codes are of."""
    first, last = codes.shape
    each = 1 if scheme.stored == "weight" else _WORD // scheme.bits
    if scheme.layout == "rows":
        return first, last * each
    return (last, first * each) if scheme.layout == "columns" else (last * each, first)


@dataclass(frozen=True)
class _Expected:
    """What lies beside the codes of a module [rows, columns], each row in `groups`; taken out of `tensors`."""

    module: str
    scheme: Scheme
    rows: int
    columns: int
    groups: int
    tensors: dict[str, StoredTensor]

    @property
    def of_scales(self) -> tuple[int, ...]:
        return (self.rows, self.groups) if self.scheme.layout == "rows" else (self.groups, self.rows)

    def has(self, ending: str) -> bool:
        return f"{self.module}.{ending}" in self.tensors

    def take(self, ending: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> StoredTensor:
        if not self.has(ending):
            raise CheckpointError(f"tensor {some([f'{self.module}.{ending}'])} is missing beside its codes: {_AGAIN}")
        tensor = self.tensors.pop(f"{self.module}.{ending}")
        if tensor.dtype not in dtypes or tensor.shape != shape:
            raise _unlike(tensor, dtypes, f"{list(shape)} ({self.scheme.words})")
        return tensor

    def order(self, ending: str | None) -> StoredTensor | None:
        """Of groups that may have any columns it must be there."""
        if ending is None or not (self.has(ending) or (self.scheme.ordered and self.scheme.group is not None)):
            return None
        return self.take(ending, _WORDS, (self.columns,))

    def zeros(self, ending: str) -> StoredTensor | None:
        if self.scheme.layout == "rows" and self.scheme.symmetric and not self.has(ending):
            return None
        words = math.ceil(self.rows * self.scheme.bits / _WORD)
        if self.scheme.stored == "weight":
            return self.take(ending, _BYTES, self.of_scales)
        return self.take(ending, _WORDS, (words, self.groups) if self.scheme.layout == "rows" else (self.groups, words))


def _unlike(tensor: StoredTensor, dtypes: tuple[str, ...], shape: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {some([tensor.name])} is {tensor.dtype} {list(tensor.shape)}, where quantization_config asks for "
        f"{' or '.join(dtypes)}, {shape}: {_AGAIN}"
    )


def _contradictions(
    modules: tuple[str, ...], made: Mapping[str, StoredTensor], settings: PackedSettings
) -> Iterator[str]:
    """What the settings say of modules and the tensors do not; the tensors are followed."""
    targets = [pattern for scheme in settings.schemes for pattern in scheme.targets]
    listed = [name for name in made if _any(settings.whole, name)]
    if listed:
        yield (
            f"quantization_config.{settings.key} says that {len(listed)} modules are whole, and they are packed: "
            f"{some(listed)}; they are read as packed"
        )
    strange = [name for name in made if name not in listed and not _any(targets, name)]
    if strange:
        yield f"{len(strange)} modules are packed that quantization_config does not name: {some(strange)}"
    wanted = (name for name in modules if name not in made and Pattern("linear").matches(name))
    whole = [name for name in wanted if _any(targets, name) and not _any(settings.whole, name)]
    if whole:
        yield (
            f"{len(whole)} modules are whole, and quantization_config.{settings.key} does not say so: {some(whole)}; "
            "they are read as they are"
        )


def _any(patterns: list[Pattern] | tuple[Pattern, ...], module: str) -> bool:
    return any(pattern.matches(module) for pattern in patterns)
