"""The part "kernels": every binary of every plugin library against a reference of its own."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_check import cache_cases, cases, fused_cases, narrow_cases
from gpu_check.items import Gpu, Item, NotRunError, Setting, each
from gpu_check.launching import shipped_kernels
from gpu_check.models import Sizes
from gpu_check.rows import Row
from gpu_check.shipped import LIBRARY, ShippedBinary, ShippedLibrary, read_library, token_counts

PART = "kernels"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_REHEARSED = 512  # the widest model whose kernels are interpreted: the published ones take hours
# What memcheck has time for.
_SMALL = ("demo float32", "demo bfloat16", "demo bfloat16-int4", "demo bfloat16-fp8", "v2-lite-bfloat16")
Work = tuple[str, Callable[[], Row]]


def libraries(setting: Setting) -> list[tuple[Path, Path]]:
    """(library's folder, config.json) of all that were prepared."""
    own = [(folder, folder / "config.json") for folder in sorted(setting.prepared.libraries.glob("*"))]
    demo = [(bundle / "plugins", bundle / "config.json") for bundle in sorted(setting.prepared.demo.glob("*"))]
    return [(folder, config) for folder, config in (*demo, *own) if (folder / LIBRARY).is_file()]


def items(setting: Setting, gpu: Gpu) -> list[Item]:
    """One a library and target; PTX last, as the driver takes its time to compile it."""
    found = libraries(setting)
    if not found:
        return [Item("plugin libraries", lambda: [_nothing(setting)])]
    made: list[tuple[bool, Item]] = []
    for folder, config in found:
        name = folder.parent.name if folder.name == "plugins" else folder.name
        name = f"demo {name}" if folder.name == "plugins" else name
        if not setting.few or name in _SMALL:
            made += _items_of(name, folder, config, setting, gpu)
    return [item for _, item in sorted(made, key=lambda pair: pair[0])]


def _nothing(setting: Setting) -> Row:
    note = (
        f"none in {setting.prepared.folder}: make them with scripts/gpu-check --prepare where the project is installed"
    )
    return Row(PART, "plugin libraries", "FAILED", note)


def _items_of(name: str, folder: Path, config: Path, setting: Setting, gpu: Gpu) -> Iterator[tuple[bool, Item]]:
    """Each with whether it is of PTX."""
    try:
        library = read_library(folder, json.loads(config.read_text(encoding="utf-8")))
    except Exception as error:
        row = Row(PART, name, "FAILED", f"{type(error).__name__}: {error}")
        yield False, Item(name, lambda: [row])
        return
    for target in library.targets():
        yield target[1], _item(name, library, target, setting, gpu)


def _item(name: str, library: ShippedLibrary, target: tuple[int, bool], setting: Setting, gpu: Gpu) -> Item:
    what = f"{name} {'PTX' if target[1] else 'cubin'} {target[0]}"
    if not runs_on(target, gpu.sm):
        return Item(what, lambda: [Row(PART, what, "not run", f"this GPU is SM {gpu.sm}")])
    if setting.rehearsal and library.sizes.hidden > _REHEARSED:
        return Item(what, lambda: [Row(PART, what, "not run", "too large to be interpreted")])
    return Item(what, lambda: check(what, library, target, setting, gpu))


def runs_on(target: tuple[int, bool], sm: int) -> bool:
    """PTX on later chips; compiled code on its own, and within 8.x on later ones."""
    own, is_ptx = target
    return own <= sm if is_ptx else own == sm or (own // 10 == sm // 10 == 8 and own <= sm)


def check(what: str, library: ShippedLibrary, target: tuple[int, bool], setting: Setting, gpu: Gpu) -> Iterator[Row]:
    """A row an op, then one that says whether every binary was launched."""
    from deepseek_trt.plugins.kernels import FUSED_KERNEL_OPS, KERNEL_OPS

    torch.manual_seed(0)
    binaries = library.of(target)
    if setting.few and library.is_narrow:  # the others are those of the whole bundle
        binaries = tuple(b for b in binaries if "Narrow" in b.op)
    place = cases.Place(gpu.device, DTYPES[library.dtype])
    with shipped_kernels(binaries, gpu.executor()) as journal:
        launched: set[tuple[str, str]] = set()

        def worst(errors: Callable[[], Iterator[float]], op: str) -> Row:
            error = 0.0
            for found in errors():
                gpu.synchronize()
                error = max(error, found)
                launched.update((launch.binary.kernel, launch.binary.sha256) for launch in journal)
                journal.clear()
            note = "" if error <= 1 else "further from the reference than rounding explains"
            return Row(PART, f"{what} {op}", "good" if error <= 1 else "FAILED", note, {"error": error})

        works: list[Work] = [
            (f"{what} {op}", functools.partial(worst, make, op))
            for op, make in _cases(
                {**KERNEL_OPS, **FUSED_KERNEL_OPS},
                place,
                library.sizes,
                binaries,
                setting.few or setting.rehearsal,
                gpu,
            )
        ]
        left_out = set()
        for row in each(PART, works, gpu.synchronize):
            left_out |= {row.what.rsplit(" ", 1)[1]} if row.result == "not run" else set()
            yield row
        yield _coverage(what, [b for b in binaries if b.op not in left_out], launched)


def _coverage(what: str, binaries: Sequence[ShippedBinary], launched: set[tuple[str, str]]) -> Row:
    shipped = {(b.kernel, b.sha256) for b in binaries}
    left = sorted({kernel for kernel, _ in shipped - launched})
    note = f"{len(launched & shipped)} of {len(shipped)} binaries launched"
    note += f"; never: {', '.join(left)}" if left else ""
    return Row(PART, f"{what} all", "FAILED" if left else "good", note)


def _cases(
    ops: Any, place: cases.Place, sizes: Sizes, binaries: tuple[ShippedBinary, ...], few: bool, gpu: Gpu
) -> Iterator[tuple[str, Callable[[], Iterator[float]]]]:
    """Each op with its cases. A new op of a library wants its line here: until then its binaries are "never"."""
    pasts = [(0,), (1, 63, 64, 65)] if few else [(0,), (1, 63, 64, 65), (4095, 0, 700), (20_000,)]
    news = (1, 5) if few else (1, 5, 8)
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((0, 5, 130), (9, 64, 7))]
    chunks += [] if few else [((0,), (1,)), ((0, 5, 130), (129, 64, 7)), ((1000,), (333,))]
    counts = (1, 5) if few else (1, 5, 64, 1000)
    shipped = {b.op for b in binaries}
    if "MlaDecode" in shipped:
        yield "MlaDecode", lambda: (cases.decode(ops, place, sizes, past, new) for past in pasts for new in news)
    if "MlaPrefill" in shipped:
        yield "MlaPrefill", lambda: (cases.prefill(ops, place, sizes, past, new) for past, new in chunks)
    for op in sorted(shipped & {"MoeRouter", "MoeBiasedRouter"}):
        yield op, lambda: (cases.router(ops, place, sizes, tokens) for tokens in counts)
    for op, case in (("MlaQuery", fused_cases.query), ("MlaValue", fused_cases.value)):
        if op in shipped:
            yield op, functools.partial(_each_bucket, functools.partial(case, ops, place, sizes), binaries, op)
    if "MoeExperts" in shipped:
        yield "MoeExperts", lambda: _experts(cases.experts, "MoeExperts", ops, place, sizes, binaries, gpu)
    if "MoeLayer" in shipped:
        yield "MoeLayer", lambda: _experts(fused_cases.layer, "MoeLayer", ops, place, sizes, binaries, gpu)
    yield from narrow_cases.cases(ops, place, sizes, binaries, few, gpu)
    decodes = [(past, new) for past in pasts for new in news]
    yield from cache_cases.cases(ops, place, sizes, binaries, decodes, chunks)
    if "Sampling" in shipped:
        yield (
            "Sampling",
            lambda: (fused_cases.sampling(place, sizes.vocab, rows) for rows in ((5,) if few else (5, 32))),
        )


def _each_bucket(case: Callable[[int], float], binaries: tuple[ShippedBinary, ...], op: str) -> Iterator[float]:
    yield from map(case, token_counts(binaries, op))


def _experts(
    case: Callable[..., float],
    op: str,
    ops: Any,
    place: cases.Place,
    sizes: Sizes,
    binaries: tuple[ShippedBinary, ...],
    gpu: Gpu,
) -> Iterator[float]:
    """Once in each bucket of token counts."""
    needed = 3 * sizes.experts * sizes.hidden * sizes.inter * place.dtype.itemsize * 1.2 + 2**30
    if gpu.free_bytes() < needed:
        raise NotRunError(f"the experts need {needed / 1e9:.1f} GB; {gpu.free_bytes() / 1e9:.1f} GB are free")
    stacks = cases.expert_stacks(place, sizes)
    for tokens in token_counts(binaries, op):
        yield case(ops, place, sizes, tokens, stacks)
