"""What the kernels and whole steps are expected to take on a chip: a model of bytes, waves and fixed costs; no GPU.

    python benchmarks/gpu_model.py

A kernel takes what its start and end cost, and the longest of three: its bytes at the bandwidth that a copy reaches,
its flops at what matrix products reach, and the steps that one block after another has to wait for. Tiles and splits
are those that the package compiles. Nothing of it was measured with these kernels: it may be off by a quarter, and by
more where the compiler does something else than the formulas. scripts/gpu-check puts its measurements beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_trt.plugins.kernels.launches import DECODE_MIN_TILES, cdiv, decode_parts, decode_programs
from deepseek_trt.plugins.kernels.tiles import decode_tile, gemm_buckets

BYTES = 2  # bfloat16
# Shares of the datasheets' figures: of bandwidth that a copy reaches and of flops that a large product reaches (an H200
# gave 0.90 and 0.80 by torch), then of the latter what these kernels' loops leave: a grouped GEMM, and attention.
COPY, MATMUL, GROUPED, ATTEND = 0.90, 0.75, 0.65, 0.45
KERNEL = 2.0e-6  # seconds: a kernel of a CUDA graph, from the end of the one before to the end of its own ramp
ROUND_TRIP = 0.8e-6  # seconds of a load that misses L2 on a busy chip
AHEAD = 2  # tiles of decode that are on their way while one is used; their pages' numbers came before
LAYER_KERNELS = 26  # of a MoE layer's prefill, counted in a plan; of them ATTENTION and EXPERTS in the formulas below
HOST, HOST_ROW = 0.2e-3, 0.01e-3  # seconds a step, and a row of it: scheduling, and what sampling on the GPU is given
HALF = 2  # half of the SMs draw all of the bandwidth


@dataclass(frozen=True)
class Chip:
    """NVIDIA's figures: bytes and dense bfloat16 flops a second, bytes of memory, blocks of decode an SM holds."""

    name: str
    sm: int
    sms: int
    bandwidth: float
    flops: float
    memory: float
    few_heads: int  # blocks an SM of 16 heads' decode, by its shared memory and registers
    many_heads: int


CHIPS = (
    Chip("A100", 80, 108, 2.04e12, 312e12, 80e9, 2, 1),
    Chip("L40S", 89, 142, 0.864e12, 362e12, 48e9, 1, 1),
    Chip("RTX 4090", 89, 128, 1.008e12, 165e12, 24e9, 1, 1),
    Chip("H100", 90, 132, 3.35e12, 989e12, 80e9, 2, 1),
    Chip("H200", 90, 132, 4.8e12, 989e12, 141e9, 2, 1),
    Chip("B200", 100, 148, 8.0e12, 2250e12, 180e9, 2, 1),
    Chip("RTX 5090", 120, 170, 1.792e12, 209e12, 32e9, 1, 1),
)


@dataclass(frozen=True)
class Model:
    """Sizes of a published model; q_rank 0: queries are not compressed."""

    name: str
    layers: int
    hidden: int
    heads: int
    q_rank: int
    inter: int
    experts: int
    top_k: int
    shared: int
    dense: int
    vocab: int = 102_400
    rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    @property
    def width(self) -> int:
        return self.rank + self.rope

    @property
    def attention_weights(self) -> int:
        """Numbers in a layer's projections."""
        query = self.heads * (self.nope + self.rope)
        queries = self.hidden * self.q_rank + self.q_rank * query if self.q_rank else self.hidden * query
        return (
            queries
            + self.hidden * self.width
            + self.heads * self.rank * (self.nope + self.value)
            + self.heads * self.value * self.hidden
        )

    @property
    def expert(self) -> int:
        """Numbers in one expert."""
        return 3 * self.hidden * self.inter

    @property
    def weights(self) -> float:
        """Bytes of all weights; the first layer is dense, embeddings and head are two matrices."""
        moe = self.attention_weights + (self.experts + self.shared) * self.expert + self.hidden * self.experts
        dense = self.attention_weights + 3 * self.hidden * self.dense
        return BYTES * ((self.layers - 1) * moe + dense + 2 * self.vocab * self.hidden)

    @property
    def decode_kernels(self) -> int:
        """Of a layer of experts, counted in a plan (tests/plugins/tensorrt/test_kernel_count.py)."""
        return 16 if self.q_rank else 14

    def hit(self, tokens: int) -> float:
        """Experts that at least one of `tokens` chooses, where all are as likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


PAGE = 64  # tokens, as exported
V2_LITE = Model("V2-Lite", 27, 2048, 16, 0, 1408, 64, 6, 2, 10944)
V2 = Model("V2", 60, 5120, 128, 1536, 1536, 160, 6, 2, 12288)

MODELS = (V2_LITE, V2)


def chip_of(name: str) -> Chip | None:
    """The chip of a device as its driver names it; None where it is none of CHIPS."""
    return next((chip for chip in CHIPS if chip.name in name), None)


def roofline(chip: Chip, nbytes: float, flops: float, blocks: int | None = None, share: float = 1.0) -> float:
    """Seconds of one kernel; `share`: of what a large product reaches."""
    drawn = 1.0 if blocks is None else min(1.0, HALF * blocks / chip.sms)
    return KERNEL + max(nbytes / (COPY * chip.bandwidth * drawn), flops / (MATMUL * share * chip.flops))


def decode(chip: Chip, heads: int, context: int, batch: int) -> float:
    """Split and combine of one layer, one new token a row."""
    rank, width = V2.rank, V2.width
    tile = decode_tile("bfloat16", heads, chip.sm, context, PAGE)
    height, block_n = tile["BLOCK_H"], tile["BLOCK_N"]
    tiles = cdiv(heads, height)
    resident = chip.few_heads if heads <= 16 else chip.many_heads
    parts = decode_parts(decode_programs(chip.sms * resident, tiles), batch)
    rows = cdiv(context, block_n)
    steps = max(cdiv(batch * rows, parts), DECODE_MIN_TILES)
    splits = cdiv(rows, steps)
    waves = cdiv(batch * tiles * splits, chip.sms * resident)
    product = 2.0 * height * block_n * (width + rank) / (MATMUL * ATTEND * chip.flops / chip.sms)
    chain = waves * (min(steps, rows) * max(ROUND_TRIP / AHEAD, product * resident) + 2 * ROUND_TRIP)
    read = batch * context * width * BYTES
    flops = 2.0 * batch * heads * context * (width + rank)
    split = max(roofline(chip, read, flops, share=ATTEND), KERNEL + chain)
    partial = batch * heads * splits * rank * 4 if splits > 1 else 0
    return split + roofline(chip, 2 * partial, 0) + 2 * ROUND_TRIP


def experts(chip: Chip, model: Model, tokens: int) -> float:
    """Both grouped GEMMs of one layer."""
    tiles = next(
        bucket.tiles
        for bucket in gemm_buckets("bfloat16", model.top_k, model.experts, chip.sm)
        if bucket.max_tokens == 0 or tokens <= bucket.max_tokens
    )
    hit, slots = model.hit(tokens), tokens * model.top_k
    rows = max(math.ceil(hit), cdiv(slots, tiles.block))
    matrix, total = model.hidden * model.inter, 0.0
    for columns, name, count, inner, outer in (
        (model.inter, tiles.gate_up, 2, model.hidden, model.inter),
        (model.hidden, tiles.down, 1, model.inter, model.hidden),
    ):
        nbytes = (hit * count * matrix + slots * (inner + outer)) * BYTES
        blocks = rows * cdiv(columns, name["BLOCK_N"])
        total += roofline(chip, nbytes, 2.0 * slots * count * matrix, blocks, GROUPED) + 2 * ROUND_TRIP
    return total


def decode_layer(chip: Chip, model: Model, context: int, batch: int) -> float:
    """One MoE layer of decode: projections and shared experts, attention, routed experts, and all small kernels."""
    dense = model.attention_weights + model.shared * model.expert + 2 * model.hidden * model.experts
    own = roofline(chip, dense * BYTES, 2.0 * batch * dense)
    small = (model.decode_kernels - 5) * KERNEL  # attention's and the experts' two count themselves, and `own` one
    return own + small + decode(chip, model.heads, context, batch) + experts(chip, model, batch)


def decode_step(chip: Chip, model: Model, context: int, batch: int) -> float:
    """A whole step, the host's part included; the dense first layer counts as one of the others."""
    head = model.vocab * model.hidden
    return (
        model.layers * decode_layer(chip, model, context, batch)
        + roofline(chip, head * BYTES, 2.0 * batch * head)
        + HOST
        + batch * HOST_ROW
    )


def prefill_layer(chip: Chip, model: Model, tokens: int) -> float:
    """One MoE layer on a chunk of new tokens with nothing before them."""
    dense = model.attention_weights + model.shared * model.expert + model.hidden * model.experts
    pairs = tokens * (tokens + 1) / 2
    attend = 2.0 * model.heads * (model.nope + model.rope + model.value) * pairs
    expand = 2.0 * model.heads * model.rank * (model.nope + model.value) * tokens
    moved = tokens * model.heads * (2 * model.nope + model.rope + 2 * model.value) * BYTES
    return (
        roofline(chip, dense * BYTES, 2.0 * tokens * dense)
        + (LAYER_KERNELS - 5) * KERNEL
        + roofline(chip, moved, attend + expand, share=ATTEND)
        + experts(chip, model, tokens)
    )


def fits(chip: Chip, model: Model) -> bool:
    """Whether weights and a cache of some sequences have room on one chip."""
    return model.weights * 1.05 < 0.95 * chip.memory


def table(first: Sequence[str], rows: Sequence[tuple[Sequence[str], Callable[[Chip], str]]]) -> str:
    """A row a point, a column a chip, and what was measured."""
    lines = [(*first, *(chip.name for chip in CHIPS), "measured")]
    lines.append((*("---" for _ in first), *("---:" for _ in CHIPS), "---"))
    lines += [(*names, *(cell(chip) for chip in CHIPS), "not measured") for names, cell in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _decode_cell(heads: int, context: int, batch: int) -> Callable[[Chip], str]:
    def cell(chip: Chip) -> str:
        seconds = decode(chip, heads, context, batch)
        share = batch * context * V2.width * BYTES / seconds / chip.bandwidth
        return f"{seconds * 1e6:,.0f} ({share:.0%})"

    return cell


def _experts_cell(model: Model, tokens: int) -> Callable[[Chip], str]:
    return lambda chip: f"{experts(chip, model, tokens) * 1e6:,.0f}"


def _tokens_cell(model: Model, batch: int) -> Callable[[Chip], str]:
    return lambda chip: f"{batch / decode_step(chip, model, 1024, batch):,.0f}" if fits(chip, model) else "no room"


def _prefill_cell(model: Model, tokens: int) -> Callable[[Chip], str]:
    def cell(chip: Chip) -> str:
        seconds = model.layers * prefill_layer(chip, model, tokens) + HOST
        return f"{tokens / seconds / 1e3:,.0f}" if fits(chip, model) else "no room"

    return cell


def _layer_cell(model: Model, batch: int) -> Callable[[Chip], str]:
    return lambda chip: f"{decode_layer(chip, model, 1024, batch) * 1e6:,.0f}"


def _prefill_layer_cell(model: Model, tokens: int) -> Callable[[Chip], str]:
    return lambda chip: f"{prefill_layer(chip, model, tokens) * 1e6:,.0f}"


def main() -> None:
    contexts = ((1024, "1K"), (8192, "8K"), (32768, "32K"))
    print("MLA decode of one layer, microseconds (share of the datasheet's bandwidth):\n")
    print(
        table(
            ("heads", "cached", "batch"),
            [
                ((str(heads), name, str(batch)), _decode_cell(heads, context, batch))
                for heads in (16, 128)
                for context, name in contexts
                for batch in (1, 8, 32, 128)
            ],
        )
    )
    print("Both grouped GEMMs of a layer's experts, microseconds:\n")
    points = [(model, tokens) for model in (V2_LITE, V2) for tokens in (1, 8, 32, 512, 4096)]
    print(table(("model", "tokens"), [((m.name, str(t)), _experts_cell(m, t)) for m, t in points]))
    print("V2-Lite, bfloat16, one chip: tokens a second of decode at 1K cached, thousands a second of prefill:\n")
    rows = [((f"decode, batch {b}",), _tokens_cell(V2_LITE, b)) for b in (1, 8, 32)]
    rows += [((f"prefill, chunk of {t}",), _prefill_cell(V2_LITE, t)) for t in (512, 4096)]
    print(table(("V2-Lite",), rows))
    gigabytes = V2.weights / 1e9
    print(f"V2 in bfloat16 ({gigabytes:.0f} GB) has room on none of them: one of its MoE layers, microseconds:\n")
    rows = [((f"decode at 1K cached, batch {b}",), _layer_cell(V2, b)) for b in (1, 8, 32)]
    rows += [((f"prefill, chunk of {t}",), _prefill_layer_cell(V2, t)) for t in (512, 4096)]
    print(table(("V2",), rows), end="")


if __name__ == "__main__":
    main()
