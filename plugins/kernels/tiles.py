"""Which tile each kernel takes on which chip: one visible row each. No Triton here.

Wrappers and the table of variants read the same rows, so what the tests run on a GPU is what ships. Under the
interpreter a program costs milliseconds whatever its size, so there the tiles are as large as the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.plugins.kernels.chips import INTERPRETER, chip_class
from deepseek_trt.plugins.kernels.launches import dot_size, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """Tile sizes by constant name, warps a block, and stages of the software pipeline."""

    sizes: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        """The size called `name`."""
        return dict(self.sizes)[name]

    def launch_options(self) -> dict[str, int]:
        """What a Triton launch takes for it."""
        return {**dict(self.sizes), "num_warps": self.num_warps, "num_stages": self.num_stages}


def tile(num_warps: int = 4, num_stages: int = 2, **sizes: int) -> Tile:
    """A Tile, written as the tables below like it."""
    return Tile(tuple(sizes.items()), num_warps, num_stages)


@dataclass(frozen=True)
class GemmTiles:
    """Both grouped GEMMs' tiles; they share BLOCK_M, the block of the dispatch."""

    gate_up: Tile
    down: Tile

    @property
    def block(self) -> int:
        """Rows a block of the dispatch has."""
        return self.gate_up["BLOCK_M"]


@dataclass(frozen=True)
class DecodeTiles:
    """For at most 16 heads, and for more."""

    few: Tile
    many: Tile


# 16-bit tiles by chip class, and one row for float32, which no matrix unit multiplies in full precision. They are
# chosen so that nothing spills and all fits at DeepSeek-V2's sizes; which of those that fit is fastest is not measured.

# Attention waits for the loads of the tile at hand while those of the next run: that takes three stages, and tiles of
# which two or three fit the shared memory. benchmarks/kernel_code.py reads it in the compiled code (docs/plugins.md).
# The more heads share one read of the cache the better, but the accumulator is 512 floats a head. With many heads on
# "hopper", 64 tokens would halve the steps of the softmax; three stages of them are 294,912 bytes, more than the chip
# has, and with two nothing overlaps (async_wait 0).
DECODE = {
    "small": DecodeTiles(tile(4, 3, BLOCK_H=16, BLOCK_N=32), tile(4, 3, BLOCK_H=16, BLOCK_N=32)),
    "ampere": DecodeTiles(tile(4, 3, BLOCK_H=16, BLOCK_N=32), tile(8, 3, BLOCK_H=32, BLOCK_N=32)),
    "hopper": DecodeTiles(tile(4, 3, BLOCK_H=16, BLOCK_N=32), tile(8, 3, BLOCK_H=64, BLOCK_N=32)),
    "blackwell": DecodeTiles(tile(4, 3, BLOCK_H=16, BLOCK_N=32), tile(8, 3, BLOCK_H=32, BLOCK_N=32)),
}
DOT_TOKENS = 16  # the fewest that a matrix unit takes
# On "small", two tiles of float32 and the queries exceed the shared memory (111,680 bytes): nothing overlaps there.
DECODE_F32 = {
    "small": tile(8, 1, BLOCK_H=16, BLOCK_N=16),
    "ampere": tile(8, 3, BLOCK_H=16, BLOCK_N=16),
    "hopper": tile(8, 3, BLOCK_H=16, BLOCK_N=16),
    "blackwell": tile(8, 3, BLOCK_H=16, BLOCK_N=16),
}

PREFILL_EXPAND = {
    "small": tile(8, 3, BLOCK_T=64, BLOCK_K=64),
    "ampere": tile(8, 3, BLOCK_T=64, BLOCK_K=64),
    "hopper": tile(8, 3, BLOCK_T=128, BLOCK_K=64),
    "blackwell": tile(8, 3, BLOCK_T=128, BLOCK_K=64),
}
PREFILL_EXPAND_F32 = tile(8, 3, BLOCK_T=32, BLOCK_K=16)

PREFILL_ATTEND = {
    "small": tile(8, 3, BLOCK_M=128, BLOCK_N=32),
    "ampere": tile(8, 3, BLOCK_M=128, BLOCK_N=32),
    "hopper": tile(8, 3, BLOCK_M=128, BLOCK_N=64),
    "blackwell": tile(8, 3, BLOCK_M=128, BLOCK_N=64),
}
PREFILL_ATTEND_F32 = tile(8, 3, BLOCK_M=32, BLOCK_N=16)


@dataclass(frozen=True)
class GemmRow:
    """The tiles for token counts with at most `rows` rows an expert on average (0: any count)."""

    rows: int
    tiles: GemmTiles


def gemm(rows: int, gate_up: Tile, down: Tile) -> GemmRow:
    """A GemmRow, written as the table below likes it."""
    return GemmRow(rows, GemmTiles(gate_up, down))


# By rows an expert gets on average. Small counts read each expert's weights once and are bound by that; from 64 rows on
# the matrix units are the limit (wgmma and tcgen05 start at 64 rows).
_GEMM_LARGE = (
    gemm(16, tile(4, 4, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64), tile(4, 4, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64)),
    gemm(64, tile(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64), tile(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64)),
    gemm(0, tile(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64), tile(8, 4, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64)),
)
GEMM = {
    "small": (
        gemm(16, tile(4, 3, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64), tile(4, 3, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64)),
        gemm(0, tile(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64), tile(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64)),
    ),
    "ampere": (
        gemm(16, tile(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64), tile(4, 4, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64)),
        gemm(64, tile(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64), tile(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64)),
        gemm(0, tile(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64), tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)),
    ),
    "hopper": _GEMM_LARGE,
    "blackwell": _GEMM_LARGE,
}
# For a step of decode: as many blocks as fill the chip even for one token, each with many loads on their way. On small
# chips the first row of GEMM is like it already, with the stages that their shared memory holds.
FEW_TOKENS = 16
GEMM_FEW = GemmTiles(tile(4, 5, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64), tile(4, 5, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64))
GEMM_F32 = (gemm(0, tile(4, 2, BLOCK_M=16, BLOCK_N=64, BLOCK_K=16), tile(4, 2, BLOCK_M=16, BLOCK_N=64, BLOCK_K=16)),)
GROUP_M = 8

WRITE = tile(4, BLOCK_S=4)
DECODE_COMBINE = tile(4, BLOCK_S=16, BLOCK_D=128)
ROUTER = tile(4, BLOCK_T=4)
DISPATCH_OFFSETS = tile(8, BLOCK_C=16, BLOCK_B=64)
COMBINE = tile(4, BLOCK_T=1, BLOCK_D=1024)
SAMPLE_ADJUST = tile(4, BLOCK=1024)
SAMPLE_PICK = tile(8, 1, BLOCK=2048, ROWS=8)  # one block a row, and eight logits a thread: more spill


def _fit(n: int, most: int) -> int:
    return min(dot_size(n), most)


def write_tile(steps: int, sm: int) -> Tile:
    """The tile of latent_write."""
    return tile(BLOCK_S=min(next_power_of_2(steps), 256)) if sm == INTERPRETER else WRITE


def decode_tile(dtype: str, heads: int, sm: int, capacity: int, page: int) -> Tile:
    """The tile of mla_decode_split: of tokens of one page where pages of `page` tokens allow it."""
    if sm == INTERPRETER:
        return tile(BLOCK_H=_fit(heads, 128), BLOCK_N=_fit(capacity, 256))
    if dtype == "float32":
        return DECODE_F32[chip_class(sm)]
    row = DECODE[chip_class(sm)]
    chosen = row.few if heads <= 16 else row.many
    if page % chosen["BLOCK_N"] == 0 or page % DOT_TOKENS:
        return chosen
    return tile(chosen.num_warps, chosen.num_stages, BLOCK_H=chosen["BLOCK_H"], BLOCK_N=DOT_TOKENS)


def decode_combine_tile(rank: int, sm: int) -> Tile:
    """The tile of mla_decode_combine."""
    return tile(BLOCK_S=16, BLOCK_D=next_power_of_2(rank)) if sm == INTERPRETER else DECODE_COMBINE


def prefill_expand_tile(dtype: str, rank: int, capacity: int, sm: int) -> Tile:
    """The tile of mla_prefill_expand."""
    if sm == INTERPRETER:
        return tile(BLOCK_T=_fit(capacity, 256), BLOCK_K=dot_size(rank))
    return PREFILL_EXPAND_F32 if dtype == "float32" else PREFILL_EXPAND[chip_class(sm)]


def prefill_attend_tile(dtype: str, steps: int, capacity: int, sm: int) -> Tile:
    """The tile of mla_prefill_attend."""
    if sm == INTERPRETER:
        return tile(BLOCK_M=_fit(steps, 256), BLOCK_N=_fit(capacity, 256))
    return PREFILL_ATTEND_F32 if dtype == "float32" else PREFILL_ATTEND[chip_class(sm)]


def router_tile(tokens: int, sm: int) -> Tile:
    """The tile of moe_router and moe_biased_router."""
    return tile(BLOCK_T=min(next_power_of_2(tokens), 256)) if sm == INTERPRETER else ROUTER


def dispatch_tile(sm: int) -> Tile:
    """The tile of moe_dispatch_offsets."""
    return DISPATCH_OFFSETS


@dataclass(frozen=True)
class GemmBucket:
    """The tiles for up to max_tokens tokens (0: any count)."""

    max_tokens: int
    tiles: GemmTiles


def gemm_buckets(dtype: str, top_k: int, experts: int, sm: int) -> tuple[GemmBucket, ...]:
    """The rows of GEMM for a chip, their limits turned from rows an expert into tokens; GEMM_FEW before them."""
    rows = GEMM_F32 if dtype == "float32" else GEMM[chip_class(sm)]
    buckets = tuple(GemmBucket(row.rows * experts // top_k, _grouped(row.tiles)) for row in rows)
    if dtype == "float32" or chip_class(sm) == "small" or buckets[0].max_tokens <= FEW_TOKENS:
        return buckets
    return (GemmBucket(FEW_TOKENS, _grouped(GEMM_FEW)), *buckets)


@dataclass(frozen=True)
class ExpertsShape:
    """One call of MoeExperts."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    inter: int


def gemm_tiles(dtype: str, shape: ExpertsShape, sm: int) -> GemmTiles:
    """The tiles of moe_gate_up and moe_down."""
    if sm == INTERPRETER:
        rows = _fit(-(-shape.tokens * shape.top_k // shape.experts), 64)
        hidden, inter = _fit(shape.hidden, 512), _fit(shape.inter, 512)
        gate_up = tile(BLOCK_M=rows, BLOCK_N=inter, BLOCK_K=hidden)
        return _grouped(GemmTiles(gate_up, tile(BLOCK_M=rows, BLOCK_N=hidden, BLOCK_K=inter)))
    buckets = gemm_buckets(dtype, shape.top_k, shape.experts, sm)
    return next(b.tiles for b in buckets if b.max_tokens == 0 or shape.tokens <= b.max_tokens)


def _grouped(tiles: GemmTiles) -> GemmTiles:
    return GemmTiles(_grouped_tile(tiles.gate_up), _grouped_tile(tiles.down))


def _grouped_tile(plain: Tile) -> Tile:
    return Tile((*plain.sizes, ("GROUP_M", GROUP_M)), plain.num_warps, plain.num_stages)


def combine_tile(tokens: int, width: int, sm: int) -> Tile:
    """The tile of moe_combine."""
    if sm == INTERPRETER:
        return tile(BLOCK_T=min(next_power_of_2(tokens), 256), BLOCK_D=next_power_of_2(width))
    return COMBINE


def sample_adjust_tile(sm: int) -> Tile:
    """The tile of sample_adjust."""
    return SAMPLE_ADJUST


def sample_pick_tile(vocab: int, sm: int) -> Tile:
    """The tile of sample_pick."""
    if sm == INTERPRETER:
        return tile(BLOCK=min(next_power_of_2(vocab), 32768), ROWS=min(next_power_of_2(-(-vocab // 256)), 128))
    return SAMPLE_PICK
