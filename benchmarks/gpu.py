"""Measure the kernels on this machine's GPU against what its memory and its matrix units reach in the same run.

    python benchmarks/gpu.py --markdown gpu.md
    python benchmarks/gpu.py --quick

First the ceilings: a large copy, and a large matrix product. Then MLA decode (16 heads are V2-Lite's, 128 are V2's) and
the grouped GEMMs of the experts, by the binaries that plugin libraries ship. Each time is the median of several runs of
one CUDA graph of 20 calls, between two CUDA events, after warm-up. The calls take turns with copies of their operands
that together exceed the L2 cache, which is filled by reading other memory before every run: writing would leave dirty
lines, whose way back to memory the timed calls would wait for. Bytes and flops are the least that the result needs:
cached rows and the hit experts' weights are counted once.
"""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import click
import torch
from rich.console import Console
from rich.table import Table

PAGE, RANK, ROPE = 64, 512, 64  # of the published models
WIDTH = RANK + ROPE
BYTES = 2  # bfloat16
DTYPE = torch.bfloat16
CALLS = 20  # of one graph


@dataclass(frozen=True)
class Experts:
    """The heads and the routed experts of one layer."""

    name: str
    heads: int
    hidden: int
    inter: int
    experts: int
    top_k: int


V2_LITE, V2 = Experts("V2-Lite", 16, 2048, 1408, 64, 6), Experts("V2", 128, 5120, 1536, 160, 6)


@dataclass(frozen=True)
class Work:
    """One point: the bytes and flops that its result needs, and one call a copy of its operands."""

    point: tuple[str, ...]
    bytes: float
    flops: float
    calls: tuple[Callable[[], None], ...]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached: bytes and flops a second."""

    copy: float
    matmul: float


class Gpu(Protocol):
    """What a Timer asks of a GPU; tests give another."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` enqueues as a graph, after two runs of it; the result enqueues the graph."""

    def flush(self) -> None:
        """Fill the L2 cache with what no call reads, by reading."""

    def seconds(self, work: Callable[[], None]) -> float:
        """The time that what `work` enqueues takes."""


class TorchGpu:
    """The first GPU of this machine, through torch."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._read = torch.zeros(max(cache, 2**25), dtype=torch.float32, device="cuda")  # four times the cache
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def flush(self) -> None:
        torch.sum(self._read, dim=0, out=self._sum)

    def seconds(self, work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Timer:
    """Seconds a call, as the median of several runs of a graph of CALLS calls, which take turns."""

    def __init__(self, runs: int, warmup: int, gpu: Gpu) -> None:
        self._runs, self._warmup, self._gpu = runs, warmup, gpu

    def __call__(self, *calls: Callable[[], object]) -> float:
        def all_calls() -> None:
            for call in itertools.islice(itertools.cycle(calls), CALLS):
                call()

        replay = self._gpu.capture(all_calls)
        times = []
        for _ in range(self._warmup + self._runs):
            self._gpu.flush()
            times.append(self._gpu.seconds(replay))
        return statistics.median(times[self._warmup :]) / CALLS


def copies_for(nbytes: float, cache: int, free: float) -> int:
    """Copies of operands of `nbytes` whose turns leave none of them in a cache; as many as fit into `free` bytes."""
    wanted = min(CALLS, math.ceil(2 * cache / nbytes) + 1)
    return max(1, min(wanted, int(free // nbytes)))


def measure_ceilings(timer: Timer) -> Ceilings:
    """A copy of 1 GiB, and a product of two 8192 x 8192 matrices in bfloat16."""
    return Ceilings(_copy_rate(timer, 2**30), _matmul_speed(timer, 8192))


def _copy_rate(timer: Timer, nbytes: int) -> float:
    source, target = (torch.empty(nbytes, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * nbytes / timer(lambda: target.copy_(source))


def _matmul_speed(timer: Timer, n: int) -> float:
    a, b = (torch.randn(n, n, device="cuda").to(DTYPE) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / timer(lambda: torch.mm(a, b, out=out))


def decode_work(heads: int, context: int, batch: int, copies: int = 1, device: str = "cuda") -> Work:
    """Attention of one token a row to `context` cached ones; the write of the new one is not in it."""
    calls = tuple(_decode_call(heads, context, batch, device) for _ in range(copies))
    moved = batch * (context * WIDTH + heads * (WIDTH + RANK)) * BYTES
    flops = 2.0 * batch * heads * context * (WIDTH + RANK)
    return Work((str(heads), f"{context // 1024}K", str(batch)), moved, flops, calls)


def _decode_call(heads: int, context: int, batch: int, device: str) -> Callable[[], None]:
    """A call on operands of its own."""
    from deepseek_trt.plugins.kernels import chips, mla_decode
    from deepseek_trt.plugins.kernels.constants import decode_constants
    from deepseek_trt.plugins.kernels.launches import cdiv, decode_parts, decode_programs
    from deepseek_trt.plugins.kernels.tiles import decode_combine_tile, decode_tile

    entries = cdiv(context, PAGE)
    pages, capacity = batch * entries + 1, entries * PAGE
    table = (torch.randperm(batch * entries) + 1).int().view(batch, entries).to(device)
    pool = torch.randn(pages, PAGE, WIDTH, device=device, dtype=DTYPE)
    past = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    new = torch.ones_like(past)
    query = torch.randn(batch, 1, heads, WIDTH, device=device, dtype=DTYPE)
    attended = torch.empty(batch, 1, heads, RANK, device=device, dtype=DTYPE)
    sm, constants = chips.chip_of(query), decode_constants(heads, RANK, ROPE, PAGE)
    tile, combine = decode_tile("bfloat16", heads, sm, capacity, PAGE), decode_combine_tile(RANK, sm)
    head_tiles = cdiv(heads, tile["BLOCK_H"])
    split = mla_decode.mla_decode_split
    shipped = hasattr(split, "resident_blocks")  # else Triton's own, compiled or interpreted
    resident = split.resident_blocks(**constants.split, **dict(tile.sizes)) if shipped else chips.resident_blocks(query)
    parts = decode_parts(decode_programs(resident, head_tiles), batch)
    partial = torch.empty(parts + batch, heads, RANK, device=device)
    lse = torch.empty(parts + batch, heads, device=device)
    scale = WIDTH**-0.5 * math.log2(math.e)

    def run() -> None:
        mla_decode.mla_decode_split[(head_tiles, parts + batch)](
            query, pool, table, past, new, partial, lse, attended, scale, batch, 1, parts, entries, pages,
            **constants.split,
            **tile.launch_options(),
        )  # fmt: skip
        mla_decode.mla_decode_combine[(batch * heads, cdiv(RANK, combine["BLOCK_D"]))](
            partial, lse, past, new, attended, batch, 1, parts, capacity, **constants.combine, BLOCK_N=tile["BLOCK_N"],
            **combine.launch_options(),
        )  # fmt: skip

    run.operands = (query, pool, table, past, attended)  # type: ignore[attr-defined]
    return run


def experts_work(
    model: Experts, tokens: int, stacks: tuple[torch.Tensor, ...], copies: int = 1, device: str = "cuda"
) -> Work:
    """Both grouped GEMMs, with SiLU between, on sorted slots; routing, sorting and the weighted sum are not in it.

    Each copy has tokens and experts of its own; the experts' weights are shared.
    """
    chosen = [torch.rand(tokens, model.experts).topk(model.top_k).indices.int().to(device) for _ in range(copies)]
    calls = tuple(_experts_call(model, ids, stacks, device) for ids in chosen)
    products, slots = model.hidden * model.inter * 3, chosen[0].numel()
    hit = statistics.mean(len(ids.unique()) for ids in chosen)
    moved = (hit * products + tokens * model.hidden + slots * (2 * model.inter + model.hidden)) * BYTES
    return Work((model.name, str(tokens)), moved, 2.0 * slots * products, calls)


def _experts_call(
    model: Experts, ids: torch.Tensor, stacks: tuple[torch.Tensor, ...], device: str
) -> Callable[[], None]:
    """A call on these experts, for tokens of its own."""
    from deepseek_trt.plugins.kernels import chips, moe_experts
    from deepseek_trt.plugins.kernels.constants import experts_constants
    from deepseek_trt.plugins.kernels.launches import cdiv
    from deepseek_trt.plugins.kernels.moe_dispatch import dispatch
    from deepseek_trt.plugins.kernels.tiles import ExpertsShape, gemm_tiles

    tokens, slots = ids.shape[0], ids.numel()
    x = torch.randn(tokens, model.hidden, device=device, dtype=DTYPE)
    inner = torch.empty(slots, model.inter, device=device, dtype=DTYPE)
    outer = torch.empty(slots, model.hidden, device=device, dtype=DTYPE)
    shape = ExpertsShape(tokens, model.top_k, model.experts, model.hidden, model.inter)
    tiles = gemm_tiles("bfloat16", shape, chips.chip_of(x))
    plan = dispatch(ids, model.experts, tiles.block)
    constants = experts_constants(model.hidden, model.inter, model.top_k)
    where = (plan.sorted_slots, plan.block_expert, slots)
    gate, up, down = stacks

    def run() -> None:
        moe_experts.moe_gate_up[(plan.blocks * cdiv(model.inter, tiles.gate_up["BLOCK_N"]),)](
            x, gate, up, inner, *where, **constants.gate_up, **tiles.gate_up.launch_options()
        )
        moe_experts.moe_down[(plan.blocks * cdiv(model.hidden, tiles.down["BLOCK_N"]),)](
            inner, down, outer, *where, **constants.down, **tiles.down.launch_options()
        )

    run.operands = (x, ids, outer)  # type: ignore[attr-defined]
    return run


def expert_stacks(model: Experts, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """gate, up and down projections of all experts."""
    shapes = ((model.inter, model.hidden), (model.inter, model.hidden), (model.hidden, model.inter))
    stacks = (torch.empty(model.experts, *shape, device=device, dtype=DTYPE) for shape in shapes)
    return tuple(stack.normal_(std=0.02) for stack in stacks)


def decode_works(quick: bool) -> Iterator[Work | str]:
    """All points, or what is said in place of one that does not fit."""
    for model in (V2_LITE, V2):
        with _shipped(model):
            yield from _decode_points(model.heads, quick)


def _decode_points(heads: int, quick: bool) -> Iterator[Work | str]:
    for context in (1024, 32768) if quick else (1024, 4096, 8192, 16384, 32768):
        for batch in (1, 32) if quick else (1, 8, 32, 128):
            needed = batch * context * WIDTH * BYTES * 1.1 + 2**29
            free = _free_bytes()
            if free < needed:
                yield f"{heads} heads, context {context}, batch {batch}: {needed / 1e9:.1f} GB do not fit"
            else:
                copies = copies_for(batch * context * WIDTH * BYTES, _cache_bytes(), 0.8 * free)
                yield decode_work(heads, context, batch, copies)


def experts_works(quick: bool) -> Iterator[Work | str]:
    """All points, or what is said in place of a model that does not fit."""
    for model in (V2_LITE, V2):
        needed = 3 * model.experts * model.hidden * model.inter * BYTES * 1.1 + 2**30
        if _free_bytes() < needed:
            yield f"{model.name}'s experts: {needed / 1e9:.1f} GB do not fit"
            continue
        stacks = expert_stacks(model)
        with _shipped(model):
            for tokens in (1, 64, 4096) if quick else (1, 4, 16, 64, 256, 1024, 4096):
                hit = min(model.experts, tokens * model.top_k) * 3 * model.hidden * model.inter * BYTES
                yield experts_work(model, tokens, stacks, copies_for(hit, _cache_bytes(), _free_bytes() / 4))
        del stacks


def _cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def _shipped(model: Experts) -> AbstractContextManager[None]:
    """The kernels as a plugin library for this GPU holds them."""
    from compiled_kernels import shipped_kernels
    from cuda.bindings import driver

    from deepseek_trt.export.config.model_config import ModelConfig

    config = ModelConfig(
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        n_routed_experts=model.experts,
        num_experts_per_tok=model.top_k,
        moe_intermediate_size=model.inter,
    )
    major, minor = torch.cuda.get_device_capability()
    stream = lambda: int(torch.cuda.current_stream().cuda_stream)  # noqa: E731
    return shipped_kernels(config, "bfloat16", 10 * major + minor, driver, stream)


def _free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


Rows = list[tuple[str, ...]]


def measured(works: Iterator[Work | str], timer: Timer, ceilings: Ceilings, console: Console) -> Rows:
    """One row a point: time, GB/s and its share of the copy, TFLOPS and their share of the product."""
    rows: Rows = []
    for work in works:
        if isinstance(work, str):
            console.print(f"left out: {work}")
            continue
        seconds = timer(*work.calls)
        rate, speed = work.bytes / seconds, work.flops / seconds
        shares = (f"{rate / 1e9:.0f}", f"{rate / ceilings.copy:.0%}", f"{speed / 1e12:.1f}")
        rows.append((*work.point, f"{seconds * 1e6:.1f}", *shares, f"{speed / ceilings.matmul:.0%}"))
        console.print(" ".join(work.point), rows[-1][len(work.point)], "us")
    return rows


FIGURES = ("us", "GB/s", "of copy", "TFLOPS", "of matmul")


def markdown_of(title: str, columns: tuple[str, ...], rows: Rows) -> str:
    """A Markdown table with a heading."""
    lines = [columns, tuple("---:" for _ in columns), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def show(console: Console, title: str, columns: tuple[str, ...], rows: Rows) -> None:
    """The same table on a terminal."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def machine() -> str:
    """Card, driver, versions and date."""
    import triton

    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return (
        f"{name} (SM {major}{minor}), driver {driver}, torch {torch.__version__}, triton {triton.__version__}, "
        f"bfloat16, {datetime.date.today().isoformat()}"
    )


HELP = """Measure MLA decode and grouped GEMM against what this GPU's memory and matrix units reach in the same run.

Example: python benchmarks/gpu.py --markdown gpu.md
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer points and fewer runs.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables to this file too.")
def main(quick: bool, markdown: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException(f"torch {torch.__version__} sees no CUDA GPU; this measures one")
    progress, console = Console(stderr=True), Console()
    torch.manual_seed(0)
    timer = Timer(*((10, 3) if quick else (30, 5)), TorchGpu())
    ceilings = measure_ceilings(timer)
    header = f"{machine()}\n\nCopy {ceilings.copy / 1e9:.0f} GB/s, matmul {ceilings.matmul / 1e12:.0f} TFLOPS."
    console.print(header)
    texts = [header + "\n"]
    parts = (
        ("MLA decode", ("heads", "context", "batch", *FIGURES), decode_works(quick)),
        ("Grouped GEMM", ("model", "tokens", *FIGURES), experts_works(quick)),
    )
    for title, columns, works in parts:
        rows = measured(works, timer, ceilings, progress)
        show(console, title, columns, rows)
        texts.append(markdown_of(title, columns, rows))
    if markdown:
        markdown.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
