"""The constants and tiles of MlaQuery's and MlaValue's kernels. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_trt.plugins.kernels.chips import INTERPRETER
from deepseek_trt.plugins.kernels.constants import Constants
from deepseek_trt.plugins.kernels.launches import dot_size, next_power_of_2
from deepseek_trt.plugins.kernels.tiles import Tile, tile

FEW_TOKENS = 16


@dataclass(frozen=True)
class AbsorbedSizes:
    """H heads; widths of latents, and of a head's rope, nope and value parts."""

    heads: int
    rank: int
    rope: int
    nope: int
    value: int


def query_constants(sizes: AbsorbedSizes) -> Constants:
    """Constants of mla_query; RHALF pairs of numbers are rotated."""
    half = sizes.rope // 2
    dims = {"H": sizes.heads, "LAT": sizes.rank, "RHALF": half, "NOPE": sizes.nope}
    return {**dims, "BLOCK_R": next_power_of_2(half), "BLOCK_LAT": next_power_of_2(sizes.rank)}


def value_constants(sizes: AbsorbedSizes) -> Constants:
    """Constants of mla_value."""
    return {"H": sizes.heads, "LAT": sizes.rank, "VALUE": sizes.value}


def query_tiles(sizes: AbsorbedSizes, sm: int) -> dict[int, Tile]:
    """Tiles of mla_query by the most tokens (0: any count)."""
    return _tiles("BLOCK_L", sizes.rank, dot_size(sizes.nope), sm)


def value_tiles(sizes: AbsorbedSizes, sm: int) -> dict[int, Tile]:
    """Tiles of mla_value by the most tokens (0: any count)."""
    return _tiles("BLOCK_V", sizes.value, dot_size(sizes.rank), sm)


def _tiles(columns: str, width: int, depth: int, sm: int) -> dict[int, Tile]:
    """Narrow columns for few tokens, so that the heads' weights are read by many programs."""
    if sm == INTERPRETER:
        whole = {columns: min(dot_size(width), 128), "BLOCK_K": min(depth, 128)}
        return {FEW_TOKENS: tile(BLOCK_T=16, **whole), 0: tile(BLOCK_T=64, **whole)}
    few = {columns: min(dot_size(width), 32), "BLOCK_K": min(depth, 64)}
    many = {columns: min(dot_size(width), 64), "BLOCK_K": min(depth, 32)}
    return {FEW_TOKENS: tile(4, 4, BLOCK_T=16, **few), 0: tile(4, 3, BLOCK_T=32, **many)}


def tile_for(tiles: dict[int, Tile], tokens: int) -> Tile:
    """The tile of the smallest bucket that holds `tokens`."""
    return next(tiles[most] for most in sorted(tiles, key=lambda most: most or 1 << 62) if not most or tokens <= most)
