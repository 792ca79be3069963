"""Measure the kernels on this machine's GPU against what its memory and its matrix units reach in the same run.

    python benchmarks/gpu.py --markdown gpu.md
    python benchmarks/gpu.py --quick

First the ceilings: a large copy, and a large matrix product. Then MLA decode (16 heads are V2-Lite's, 128 are V2's) and
the grouped GEMMs of the experts. Each time is the median of single runs, as one CUDA graph each, between two CUDA
events, after warm-up, with the L2 cache overwritten before every run. Bytes and flops are the least that the result
needs: cached rows and the hit experts' weights are counted once.
"""

from __future__ import annotations

import datetime
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

PAGE, RANK, ROPE = 64, 512, 64  # of the published models
WIDTH = RANK + ROPE
BYTES = 2  # bfloat16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int


V2_LITE, V2 = Experts("V2-Lite", 2048, 1408, 64, 6), Experts("V2", 5120, 1536, 160, 6)


@dataclass(frozen=True)
class Work:
    """One point: what to run, and the bytes and flops that its result needs."""

    point: tuple[str, ...]
    bytes: float
    flops: float
    run: Callable[[], None]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached: bytes and flops a second."""

    copy: float
    matmul: float


class Timer:
    """Seconds a run, as the median of several."""

    def __init__(self, runs: int, warmup: int) -> None:
        self._runs, self._warmup = runs, warmup
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(4 * max(cache, 2**25), dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        graph = _captured(run)
        return statistics.median([self._once(graph) for _ in range(self._warmup + self._runs)][self._warmup :])

    def _once(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The run as a graph: launching costs the CPU the same whatever the number of kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


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


def decode_work(heads: int, context: int, batch: int, device: str = "cuda") -> Work:
    """Attention of one token a row to `context` cached ones; the write of the new one is not in it."""
    from deepseek_trt.plugins.kernels import chips, mla_decode
    from deepseek_trt.plugins.kernels.constants import decode_constants
    from deepseek_trt.plugins.kernels.launches import cdiv, decode_splits
    from deepseek_trt.plugins.kernels.tiles import decode_combine_tile, decode_tile

    entries = cdiv(context, PAGE)
    table = (torch.randperm(batch * entries) + 1).int().view(batch, entries).to(device)
    pool = torch.randn(batch * entries + 1, PAGE, WIDTH, device=device, dtype=DTYPE)
    past = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    query = torch.randn(batch, heads, WIDTH, device=device, dtype=DTYPE)
    attended = torch.empty(batch, heads, RANK, device=device, dtype=DTYPE)
    sm, constants = chips.chip_of(query), decode_constants(heads, RANK, ROPE)
    tile, combine = decode_tile("bfloat16", heads, sm, entries * PAGE), decode_combine_tile(RANK, sm)
    head_tiles = cdiv(heads, tile["BLOCK_H"])
    splits = decode_splits(batch, head_tiles, entries * PAGE, tile["BLOCK_N"])
    partial = torch.empty(batch, heads, splits, RANK, device=device)
    lse = torch.empty(batch, heads, splits, device=device)
    scale = WIDTH**-0.5 * math.log2(math.e)

    def run() -> None:
        mla_decode.mla_decode_split[(head_tiles, splits, batch)](
            query, pool, table, past, partial, lse, scale, splits, entries, PAGE, **constants.split,
            **tile.launch_options(),
        )  # fmt: skip
        mla_decode.mla_decode_combine[(batch * heads, cdiv(RANK, combine["BLOCK_D"]))](
            partial, lse, past, attended, splits, **constants.combine, BLOCK_N=tile["BLOCK_N"],
            **combine.launch_options(),
        )  # fmt: skip

    moved = batch * (context * WIDTH + heads * (WIDTH + RANK)) * BYTES
    flops = 2.0 * batch * heads * context * (WIDTH + RANK)
    return Work((str(heads), f"{context // 1024}K", str(batch)), moved, flops, run)


def experts_work(model: Experts, tokens: int, stacks: tuple[torch.Tensor, ...], device: str = "cuda") -> Work:
    """Both grouped GEMMs, with SiLU between, on sorted slots; routing, sorting and the weighted sum are not in it."""
    from deepseek_trt.plugins.kernels import chips, moe_experts
    from deepseek_trt.plugins.kernels.constants import experts_constants
    from deepseek_trt.plugins.kernels.launches import cdiv
    from deepseek_trt.plugins.kernels.moe_dispatch import dispatch
    from deepseek_trt.plugins.kernels.tiles import ExpertsShape, gemm_tiles

    ids = torch.rand(tokens, model.experts).topk(model.top_k).indices.int().to(device)
    x = torch.randn(tokens, model.hidden, device=device, dtype=DTYPE)
    slots = ids.numel()
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

    products = model.hidden * model.inter * 3
    moved = (len(ids.unique()) * products + tokens * model.hidden + slots * (2 * model.inter + model.hidden)) * BYTES
    return Work((model.name, str(tokens)), moved, 2.0 * slots * products, run)


def expert_stacks(model: Experts, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """gate, up and down projections of all experts."""
    shapes = ((model.inter, model.hidden), (model.inter, model.hidden), (model.hidden, model.inter))
    stacks = (torch.empty(model.experts, *shape, device=device, dtype=DTYPE) for shape in shapes)
    return tuple(stack.normal_(std=0.02) for stack in stacks)


def decode_works(quick: bool) -> Iterator[Work | str]:
    """All points, or what is said in place of one that does not fit."""
    for heads in (16, 128):
        for context in (1024, 32768) if quick else (1024, 4096, 8192, 16384, 32768):
            for batch in (1, 32) if quick else (1, 8, 32, 128):
                needed = batch * context * WIDTH * BYTES * 1.1 + 2**29
                if _free_bytes() < needed:
                    yield f"{heads} heads, context {context}, batch {batch}: {needed / 1e9:.1f} GB do not fit"
                else:
                    yield decode_work(heads, context, batch)


def experts_works(quick: bool) -> Iterator[Work | str]:
    """All points, or what is said in place of a model that does not fit."""
    for model in (V2_LITE, V2):
        needed = 3 * model.experts * model.hidden * model.inter * BYTES * 1.1 + 2**30
        if _free_bytes() < needed:
            yield f"{model.name}'s experts: {needed / 1e9:.1f} GB do not fit"
            continue
        stacks = expert_stacks(model)
        for tokens in (1, 64, 4096) if quick else (1, 4, 16, 64, 256, 1024, 4096):
            yield experts_work(model, tokens, stacks)
        del stacks


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
        seconds = timer(work.run)
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
    timer = Timer(*((10, 3) if quick else (50, 10)))
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
