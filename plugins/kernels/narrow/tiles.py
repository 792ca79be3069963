"""Which tile each kernel over narrow weights takes on which chip: one visible row each. No Triton here.

A step along K is the format's; a product's left side are BLOCK_N rows of the weight, its right side BLOCK_M tokens, so
that 64 rows fill a matrix unit however few tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.plugins.kernels.chips import INTERPRETER
from deepseek_trt.plugins.kernels.launches import dot_size
from deepseek_trt.plugins.kernels.narrow.formats import KernelFormat
from deepseek_trt.plugins.kernels.tiles import GROUP_M, ExpertsShape, GemmBucket, GemmTiles, Tile, tile

MOST_ROWS = 128  # of a tile: those of a block of E4M3 share a scale


@dataclass(frozen=True)
class LinearBucket:
    """The tile for up to max_tokens tokens (0: any count)."""

    max_tokens: int
    tile: Tile


# The same for all chips, and chosen so that nothing spills and all fits the smallest of them; which of those that fit
# is fastest is not measured. BLOCK_K comes from the format.
LINEAR = (
    LinearBucket(16, tile(4, 5, BLOCK_M=16, BLOCK_N=64)),
    LinearBucket(64, tile(4, 4, BLOCK_M=64, BLOCK_N=64)),
    LinearBucket(0, tile(8, 4, BLOCK_M=128, BLOCK_N=64)),
)
F32_STEP = 32  # columns; float32 is multiplied outside of the matrix units, a register a number
LINEAR_F32 = (LinearBucket(0, tile(4, 3, BLOCK_M=16, BLOCK_N=64)),)
SUM = tile(4, BLOCK=1024)


@dataclass(frozen=True)
class _Row:
    """The tile of both grouped products for at most `rows` rows an expert on average (0: any count)."""

    rows: int
    tile: Tile


EXPERTS = (
    _Row(16, tile(4, 4, BLOCK_M=16, BLOCK_N=64)),
    _Row(64, tile(8, 4, BLOCK_M=64, BLOCK_N=64)),
    _Row(0, tile(8, 3, BLOCK_M=128, BLOCK_N=64)),
)
EXPERTS_F32 = (_Row(0, tile(4, 2, BLOCK_M=16, BLOCK_N=32)),)


def linear_buckets(kind: KernelFormat, dtype: str) -> tuple[LinearBucket, ...]:
    """The rows of LINEAR."""
    rows = LINEAR_F32 if dtype == "float32" else LINEAR
    return tuple(LinearBucket(row.max_tokens, _stepped(row.tile, _step(kind, dtype))) for row in rows)


def linear_tile(kind: KernelFormat, dtype: str, tokens: int, rows: int, sm: int) -> Tile:
    """The tile of linear_narrow."""
    if sm == INTERPRETER:
        return _stepped(tile(BLOCK_M=min(dot_size(tokens), 64), BLOCK_N=min(dot_size(rows), MOST_ROWS)), kind.step)
    buckets = linear_buckets(kind, dtype)
    return next(b.tile for b in buckets if b.max_tokens == 0 or tokens <= b.max_tokens)


def experts_buckets(kind: KernelFormat, dtype: str, top_k: int, experts: int) -> tuple[GemmBucket, ...]:
    """The rows of EXPERTS, their limits turned from rows an expert into tokens."""
    rows = EXPERTS_F32 if dtype == "float32" else EXPERTS
    return tuple(GemmBucket(row.rows * experts // top_k, _both(row.tile, _step(kind, dtype))) for row in rows)


def experts_tiles(kind: KernelFormat, dtype: str, shape: ExpertsShape, sm: int) -> GemmTiles:
    """The tiles of moe_gate_up_narrow and moe_down_narrow."""
    if sm == INTERPRETER:
        rows = min(dot_size(-(-shape.tokens * shape.top_k // shape.experts)), 64)
        return _both(tile(BLOCK_M=rows, BLOCK_N=MOST_ROWS), kind.step)
    buckets = experts_buckets(kind, dtype, shape.top_k, shape.experts)
    return next(b.tiles for b in buckets if b.max_tokens == 0 or shape.tokens <= b.max_tokens)


def _step(kind: KernelFormat, dtype: str) -> int:
    return F32_STEP if dtype == "float32" else kind.step


def _both(plain: Tile, step: int) -> GemmTiles:
    stepped = _stepped(plain, step)
    grouped = Tile((*stepped.sizes, ("GROUP_M", GROUP_M)), stepped.num_warps, stepped.num_stages)
    return GemmTiles(grouped, grouped)


def _stepped(plain: Tile, step: int) -> Tile:
    return Tile((*plain.sizes, ("BLOCK_K", step)), plain.num_warps, plain.num_stages)
