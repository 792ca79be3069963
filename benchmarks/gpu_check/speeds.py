"""The part "speed": shipped kernels against what this GPU's memory and matrix units reach in the same run.

An op's wrapper runs once on its operands, through the library's binaries; its launches are then timed alone, without
what the wrapper does around them. Bytes and flops are the least that the result needs: cached rows and the hit experts'
weights are counted once.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_model
import torch

from gpu_check import cases
from gpu_check.checks import DTYPES, libraries, runs_on
from gpu_check.items import Gpu, Item, NotRunError, Setting, each
from gpu_check.launching import Launch, shipped_kernels
from gpu_check.models import Sizes
from gpu_check.rows import Row
from gpu_check.shipped import ShippedLibrary, read_library
from gpu_check.timing import Ceilings, Timer, copies_for, measure_ceilings

PART = "speed"


@dataclass(frozen=True)
class Points:
    """What is timed: (context, batch) of decode, tokens of the experts, (past, new) of prefill.

    full: of what has points of its own, all of them.
    """

    decode: tuple[tuple[int, int], ...]
    experts: tuple[int, ...]
    prefill: tuple[tuple[int, int], ...]
    full: bool = True


MEASURED = Points(
    decode=tuple((context, batch) for context in (1024, 8192, 32768) for batch in (1, 8, 32, 128)),
    experts=(1, 8, 32, 128, 512, 4096),
    prefill=((0, 512), (0, 4096), (4096, 512)),
)
REHEARSED = Points(decode=((128, 2),), experts=(2,), prefill=((0, 16),), full=False)


@dataclass(frozen=True)
class Work:
    """One point: the bytes and flops that its result needs, and the launches of each copy of its operands.

    `expected` gives the seconds that gpu_model.py expects of a chip, where it has the point.
    """

    bytes: float
    flops: float
    calls: Sequence[Sequence[Launch]]
    expected: Callable[[gpu_model.Chip], float] | None = None


def items(setting: Setting, gpu: Gpu) -> list[Item]:
    """The ceilings, then one item a bfloat16 library and op; the published models', or the demo's where rehearsed."""
    timer = Timer(1, 0, gpu, calls=2) if setting.rehearsal else Timer(10, 3, gpu)
    sizes = (2**16, 64) if setting.rehearsal else (2**30, 8192)
    ceilings: list[Ceilings] = []

    def measured() -> Ceilings:
        """Once in a process: a child that starts later measures them again."""
        if not ceilings:
            ceilings.append(measure_ceilings(timer, gpu.device, *sizes))
        return ceilings[0]

    made = [Item("ceilings", lambda: [_ceilings_row(measured(), *sizes)])]
    for folder, config in libraries(setting):
        is_demo = folder.name == "plugins"
        if is_demo != setting.rehearsal or "bfloat16" not in str(folder) or "v3" in folder.name:
            continue
        name = folder.parent.name if is_demo else folder.name
        points = REHEARSED if setting.rehearsal else MEASURED
        library = read_library(folder, json.loads(config.read_text(encoding="utf-8")))
        if library.is_narrow:
            from gpu_check import speeds_narrow  # which imports this

            made += speeds_narrow.items(name, library, points, setting.rehearsal, measured, timer, gpu)
            continue
        from gpu_check import speeds_fused  # which imports this

        works = {**_WORKS, "MoeLayer": speeds_fused.layer_works, "Sampling": speeds_fused.sampling_works}
        for op in works:
            made.append(
                Item(f"{name} {op}", functools.partial(_rows, name, library, works[op], points, measured, timer, gpu))
            )
    return made


def _ceilings_row(found: Ceilings, nbytes: int, n: int) -> Row:
    note = f"a copy of {nbytes:,} bytes, read and written; a product of random {n} x {n} bfloat16 matrices"
    return Row(PART, "ceilings", "good", note, {"GB/s": found.copy / 1e9, "TFLOPS": found.matmul / 1e12})


def _rows(
    name: str,
    library: ShippedLibrary,
    works_of: Callable[..., Named],
    points: Points,
    measured: Callable[[], Ceilings],
    timer: Timer,
    gpu: Gpu,
) -> Iterator[Row]:
    torch.manual_seed(0)
    ceilings = measured()
    usable = [target for target in library.targets() if runs_on(target, gpu.sm)]
    target = max(usable, key=lambda t: (not t[1], t[0]))  # compiled code before PTX
    note = f"by PTX for SM {target[0]}, as there is no code for this chip" if target[1] else ""
    place = cases.Place(gpu.device, DTYPES[library.dtype])
    with shipped_kernels(library.of(target), gpu.executor()) as journal:

        def row(what: str, make: Callable[[], Work]) -> Row:
            work = make()
            seconds = timer(*(_all_of(launches) for launches in work.calls))
            journal.clear()
            return Row(PART, what, "good", note, figures(work, seconds, ceilings) | _expected(work, gpu))

        works = works_of(place, library.sizes, points, journal, gpu)
        yield from each(
            PART,
            ((f"{name} {what}", functools.partial(row, f"{name} {what}", make)) for what, make in works),
            gpu.synchronize,
        )


def figures(work: Work, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """Microseconds, and rates with their shares of the ceilings."""
    rate, speed = work.bytes / seconds, work.flops / seconds
    return {
        "us": seconds * 1e6,
        "GB/s": rate / 1e9,
        "of copy": rate / ceilings.copy,
        "TFLOPS": speed / 1e12,
        "of matmul": speed / ceilings.matmul,
    }


def _expected(work: Work, gpu: Gpu) -> dict[str, float]:
    chip = gpu_model.chip_of(gpu.name)
    return {"model us": work.expected(chip) * 1e6} if chip and work.expected else {}


def _all_of(launches: Sequence[Launch]) -> Callable[[], None]:
    def run() -> None:
        for launch in launches:
            launch()

    return run


def recorded(journal: list[Launch], run: Callable[[], object], kernels: tuple[str, ...] = ()) -> list[Launch]:
    """The launches that `run` makes, of `kernels` where some are named, else all but the write of new latents.

    LookupError where one of `kernels` is not launched: something else would be timed.
    """
    journal.clear()
    run()
    missing = set(kernels) - {launch.binary.kernel for launch in journal}
    if missing or not journal:
        raise LookupError(f"{', '.join(sorted(missing)) or 'nothing'} was not launched: say what is to be timed")
    return [launch for launch in journal if launch.binary.kernel in kernels or not (kernels or _is_write(launch))]


def _is_write(launch: Launch) -> bool:
    return launch.binary.kernel == "latent_write"


Named = Iterable[tuple[str, Callable[[], Work]]]


def _ops() -> dict[str, Callable[..., Any]]:
    from deepseek_trt.plugins.kernels import KERNEL_OPS

    return KERNEL_OPS


def decode_works(place: cases.Place, sizes: Sizes, points: Points, journal: list[Launch], gpu: Gpu) -> Named:
    """Attention of one token a row to the cached ones, and the write of the new one."""

    def make(context: int, batch: int) -> Work:
        width = place.dtype.itemsize
        cached = batch * context * sizes.width * width
        if gpu.free_bytes() < 2.5 * cached + 2**29:  # the wrapper copies the pool
            raise NotRunError(f"{2.5 * cached / 1e9:.1f} GB do not fit")
        copies = copies_for(2.1 * cached, gpu.cache_bytes(), 0.8 * gpu.free_bytes())
        calls = [_decode_call(place, sizes, context, batch, journal) for _ in range(copies)]
        moved = cached + batch * sizes.heads * (sizes.width + sizes.rank) * width
        flops = 2.0 * batch * sizes.heads * context * (sizes.width + sizes.rank)
        return Work(moved, flops, calls, lambda chip: gpu_model.decode(chip, sizes.heads, context, batch))

    for context, batch in points.decode:
        yield f"decode {sizes.heads} heads, {context} cached, batch {batch}", functools.partial(make, context, batch)


def _decode_call(place: cases.Place, sizes: Sizes, context: int, batch: int, journal: list[Launch]) -> list[Launch]:
    entries = -(-context // cases.PAGE)
    table = (torch.randperm(batch * entries, device=place.device) + 1).int().view(batch, entries)
    given = (
        place.random(batch, 1, sizes.heads, sizes.width),
        place.random(batch, 1, sizes.width),
        torch.randn(batch * entries + 1, cases.PAGE, sizes.width, device=place.device, dtype=place.dtype),
        table,
        place.ints([context - 1] * batch),
        place.ints([1] * batch),
    )
    run = lambda: _ops()["MlaDecode"](*given, sizes.width**-0.5, sizes.rank)  # noqa: E731
    return recorded(journal, run)


def experts_works(place: cases.Place, sizes: Sizes, points: Points, journal: list[Launch], gpu: Gpu) -> Named:
    """Both grouped GEMMs, with SiLU between; then all kernels, sorting and weighted sum included."""
    products, width = sizes.hidden * sizes.inter * 3, place.dtype.itemsize
    needed = products * sizes.experts * width * 1.1 + 2**30
    stacks: list[tuple[torch.Tensor, ...]] = []

    def make(tokens: int, kernels: tuple[str, ...]) -> Work:
        if not stacks:
            if gpu.free_bytes() < needed:
                raise NotRunError(f"{needed / 1e9:.1f} GB do not fit")
            stacks.append(cases.expert_stacks(place, sizes))
        hit_bytes = min(sizes.experts, tokens * sizes.top_k) * products * width
        copies = copies_for(hit_bytes, gpu.cache_bytes(), gpu.free_bytes() / 4)
        ids = [
            torch.rand(tokens, sizes.experts).topk(sizes.top_k).indices.int().to(place.device) for _ in range(copies)
        ]
        calls = [_experts_call(place, sizes, own, stacks[0], journal, kernels) for own in ids]
        hit, slots = statistics.mean(len(own.unique()) for own in ids), tokens * sizes.top_k
        moved = (hit * products + tokens * sizes.hidden + slots * (2 * sizes.inter + sizes.hidden)) * width
        model = next((m for m in gpu_model.MODELS if (m.hidden, m.inter) == (sizes.hidden, sizes.inter)), None)
        known = (lambda chip: gpu_model.experts(chip, model, tokens)) if model and kernels else None
        return Work(moved, 2.0 * slots * products, calls, known)

    for tokens in points.experts:
        for what, kernels in (("grouped GEMM", _GEMMS), ("experts", ())):
            yield f"{what}, {tokens} tokens", functools.partial(make, tokens, kernels)


_GEMMS = ("moe_gate_up", "moe_down")


def _experts_call(
    place: cases.Place,
    sizes: Sizes,
    ids: torch.Tensor,
    stacks: tuple[torch.Tensor, ...],
    journal: list[Launch],
    kernels: tuple[str, ...],
) -> list[Launch]:
    hidden, weights = place.random(len(ids), sizes.hidden), torch.rand(ids.shape, device=place.device)
    return recorded(journal, lambda: _ops()["MoeExperts"](hidden, weights, ids, *stacks, "silu"), kernels)


def prefill_works(place: cases.Place, sizes: Sizes, points: Points, journal: list[Launch], gpu: Gpu) -> Named:
    """Expansion of keys and values, and attention, of one row; the write of the new latents is not timed."""

    def make(past: int, new: int) -> Work:
        total, width = past + new, place.dtype.itemsize
        pairs = new * past + new * (new + 1) / 2
        attend = 2.0 * sizes.heads * (sizes.nope + sizes.rope + sizes.value) * pairs
        expand = 2.0 * sizes.heads * sizes.rank * (sizes.nope + sizes.value) * total
        moved = (total * sizes.width + new * sizes.heads * (sizes.nope + sizes.rope + sizes.value)) * width
        return Work(moved, attend + expand, [_prefill_call(place, sizes, past, new, journal)])

    for past, new in points.prefill:
        yield f"prefill {sizes.heads} heads, {new} new, {past} cached", functools.partial(make, past, new)


def _prefill_call(place: cases.Place, sizes: Sizes, past: int, new: int, journal: list[Launch]) -> list[Launch]:
    pages = cases.pages_of(place, [past], past + new, sizes.width)
    given = (
        place.random(1, new, sizes.heads, sizes.nope + sizes.rope),
        place.random(1, new, sizes.width),
        pages.pool,
        pages.table,
        place.ints([past]),
        place.ints([new]),
        place.random(sizes.heads, sizes.nope, sizes.rank, scale=sizes.rank**-0.5),
        place.random(sizes.heads, sizes.value, sizes.rank, scale=sizes.rank**-0.5),
    )
    run = lambda: _ops()["MlaPrefill"](*given, (sizes.nope + sizes.rope) ** -0.5)  # noqa: E731
    return recorded(journal, run)


# What is timed here; speeds_fused.py and speeds_narrow.py have the others.
_WORKS: dict[str, Callable[..., Named]] = {
    "MlaDecode": decode_works,
    "MoeExperts": experts_works,
    "MlaPrefill": prefill_works,
}
