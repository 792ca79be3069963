"""Read what the compiler made of the attention kernels: does the math run while the next tile's loads do?

    python benchmarks/kernel_code.py
    python benchmarks/kernel_code.py --sm 90

Every attention kernel that a plugin library ships is compiled, for V2-Lite's 16 heads and for V2's 128, over whole and
narrow caches; that needs no GPU. Registers, spills and shared memory are ptxas's. The overlap is read in TTGIR,
Triton's last form before LLVM's: how many tiles of what a loop loads lie in shared memory at once, and how many of an
iteration's loads may still be on their way where it first uses one (`async_wait`); or how many loads go to registers
that only the next iteration reads. Nothing here says how fast a kernel is: only a GPU does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click

from deepseek_trt.export.bundle.narrow_cache import CACHE_DTYPES, NarrowCache
from deepseek_trt.export.config.model_config import ModelConfig
from deepseek_trt.plugins.aot.compile import compile_requests
from deepseek_trt.plugins.aot.narrow_use import NarrowUse
from deepseek_trt.plugins.aot.variants import variants_for
from deepseek_trt.plugins.aot.worker import Compiled, Request
from deepseek_trt.plugins.kernels.chips import SHARED_LIMITS

SMS = (80, 89, 90, 100, 120)  # one of each matrix unit, and of each size of shared memory
HEADS = (16, 128)
TILE = ("BLOCK_H", "BLOCK_M", "BLOCK_T", "BLOCK_N", "BLOCK_K")
WHOLE_LOADS_AHEAD = ("mla_decode_split", "mla_prefill_expand", "mla_prefill_attend")
# The others have no product in a loop.
LOADS_AHEAD = (*WHOLE_LOADS_AHEAD, "mla_decode_split_narrow", "mla_prefill_expand_narrow")
_PER_HEADS = ("mla_decode_split", "mla_decode_split_narrow")
_TILE_LOAD = re.compile(r"(%\w+) = tt\.load .*: tensor<\d+x\d+x!tt\.ptr<")
_BUFFER = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32)\b")
_WAIT = re.compile(r"ttg\.async_wait .*\{num = (\d+)")


@dataclass(frozen=True)
class Overlap:
    """Of the kernel's loop: tiles of each operand in shared memory, loads an iteration starts, and loads not awaited.

    `pending` counts loads that may still run where an iteration first uses what was loaded for it. `in_registers`:
    loads go to registers, and those that may still run are handed to the next iteration unread.
    """

    buffers: int
    loads: int
    pending: int
    in_registers: bool = False

    @property
    def runs_ahead(self) -> bool:
        """Whether the loads of at least one whole tile run while the tile before is used."""
        return (self.in_registers or self.buffers >= 2) and self.pending >= self.loads > 0


def read_overlap(ttgir: str) -> Overlap | None:
    """What the loop with asynchronous loads does, or one that hands loads on; None where no loop does either.

    ValueError where several load asynchronously.
    """
    loops = [loop for loop in _loops(ttgir.splitlines()) if any("ttg.async_copy" in line for line in loop)]
    if not loops:
        return next(filter(None, map(_handed_on, _loops(ttgir.splitlines()))), None)
    if len(loops) > 1:
        raise ValueError(f"{len(loops)} loops load asynchronously: which one is the kernel's?")
    (loop,) = loops
    waits = [int(found[1]) for line in loop if (found := _WAIT.search(line))]
    loads = sum("ttg.async_commit_group" in line for line in loop)
    return Overlap(min(map(int, _BUFFER.findall(ttgir)), default=1), loads, min(waits, default=0))


def _handed_on(loop: Sequence[str]) -> Overlap | None:
    """Of a loop with products, tiles that it loads into registers; None where the next iteration gets none of them."""
    loads = [found[1] for line in loop if (found := _TILE_LOAD.search(line))]
    *body, given, _ = loop
    read = [name for line in body for name in re.findall(r"%\w+", line.partition(" = ")[2] or line)]
    unread = [name for name in re.findall(r"%\w+", given) if name in loads and name not in read]
    has_products = any(" tt.dot " in line for line in loop)
    return Overlap(1, len(loads), len(unread), in_registers=True) if unread and has_products else None


def _loops(lines: Sequence[str]) -> Iterator[list[str]]:
    """The lines of each innermost or outer loop, from `scf.for` to the brace that ends it."""
    for start, line in enumerate(lines):
        if " scf.for " in line:
            indent = line[: len(line) - len(line.lstrip())]
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(indent + "}"))
            yield lines[start : end + 1]


def attention_requests(sm: int, dtype: str, heads: Sequence[int] = HEADS) -> list[Request]:
    """Each attention kernel that ships for `sm`: once where the heads change nothing in it."""
    found: dict[str, Request] = {}
    for count in heads:
        config = ModelConfig(num_attention_heads=count, n_routed_experts=0)
        for v in variants_for(config, dtype, sm):
            found.setdefault(f"{v.kernel} {count if v.kernel in _PER_HEADS else ''}", Request(v, sm))
        for format in CACHE_DTYPES:
            for v in variants_for(config, dtype, sm, narrow=NarrowUse(cache=NarrowCache.of(config, format))):
                if v.kernel in LOADS_AHEAD and v.kernel not in WHOLE_LOADS_AHEAD:
                    found.setdefault(f"{v.op} {count if v.kernel in _PER_HEADS else ''}", Request(v, sm))
    return list(found.values())


def _row(compiled: Compiled) -> tuple[str, ...]:
    variant, constants = compiled.binary.variant, dict(compiled.binary.variant.constexprs)
    heads = f", {constants['H']} heads" if variant.kernel in _PER_HEADS else ""
    format = f", {variant.op.partition('Narrow')[2].lower()}" if variant.kernel.endswith("narrow") else ""
    tile = " x ".join(str(constants[name]) for name in TILE if name in constants)
    overlap = read_overlap(compiled.ttgir)
    ahead = ("-", "-")
    if overlap is not None:
        where = "registers" if overlap.in_registers else str(overlap.buffers)
        ahead = where, f"{overlap.pending} of {overlap.loads}"
    return (
        f"sm_{compiled.binary.sm}",
        f"{variant.kernel}{heads}{format}",
        variant.dtype,
        tile or "-",
        str(variant.num_warps),
        str(compiled.registers),
        str(compiled.spill_bytes),
        f"{compiled.binary.shared_bytes:,} of {SHARED_LIMITS[compiled.binary.sm]:,}",
        *ahead,
    )


def table(compiled: Sequence[Compiled]) -> str:
    """One row a kernel."""
    head = (
        "chip",
        "kernel",
        "dtype",
        "tile",
        "warps",
        "registers",
        "spilled",
        "shared bytes",
        "buffers",
        "not awaited",
    )
    rows = [head, ("---",) * len(head), *map(_row, compiled)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@click.command()
@click.option(
    "--sm", "sms", type=click.Choice([str(sm) for sm in SHARED_LIMITS]), multiple=True, help="Only this chip."
)
@click.option("--jobs", default=2, show_default=True, help="Kernels compiled at once.")
def main(sms: tuple[str, ...], jobs: int) -> None:
    """A table of the attention kernels of bfloat16 and float32, in Markdown."""
    chips = [int(sm) for sm in sms] or SMS
    requests = [r for sm in chips for dtype in ("bfloat16", "float32") for r in attention_requests(sm, dtype)]
    print(table(compile_requests(requests, jobs)))


if __name__ == "__main__":
    main()
