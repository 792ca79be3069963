"""The constants that kernels over a narrow cache take from the model's dimensions, and their tiles. No Triton here."""

from __future__ import annotations

from dataclasses import replace

from deepseek_trt.export.bundle.narrow_cache import NarrowCache
from deepseek_trt.plugins.kernels import tiles
from deepseek_trt.plugins.kernels.chips import INTERPRETER
from deepseek_trt.plugins.kernels.constants import (
    Constants,
    DecodeConstants,
    PrefillConstants,
    decode_constants,
    prefill_constants,
)
from deepseek_trt.plugins.kernels.launches import dot_size, next_power_of_2
from deepseek_trt.plugins.kernels.narrow.formats import FP8_CODE, INT8_CODE
from deepseek_trt.plugins.kernels.tiles import Tile, tile

CODES = {"int8": INT8_CODE, "fp8": FP8_CODE}  # of a cache's formats, the kernels' FORMAT


def cache_constants(cache: NarrowCache) -> Constants:
    """What each of them takes: a token's scales, and the numbers of each, both padded to powers of two.

    Groups are of a power of two, or there is one (export.bundle.narrow_cache): so columns lie as they are stored.
    """
    padded = {"BLOCK_G": next_power_of_2(cache.groups), "BLOCK_GROUP": dot_size(cache.group)}
    return {"FORMAT": CODES[cache.format], "GROUP": cache.group, **padded}


def narrow_write_constants(cache: NarrowCache, rope: int, page: int) -> Constants:
    """Constants of latent_narrow, for rope keys of `rope` in pages of `page` tokens."""
    return {"LAT": cache.rank, "ROPE": rope, "PAGE": page, "BLOCK_R": next_power_of_2(rope), **cache_constants(cache)}


def narrow_decode_constants(cache: NarrowCache, heads: int, rope: int, page: int) -> DecodeConstants:
    """Constants of mla_decode_split_narrow and mla_decode_combine."""
    whole = decode_constants(heads, cache.rank, rope, page)
    split = {name: value for name, value in whole.split.items() if name not in ("BLOCK_L", "BLOCK_S")}
    return replace(whole, split={**split, **cache_constants(cache)})


def narrow_prefill_constants(
    cache: NarrowCache, heads: int, rope: int, nope: int, value: int, page: int
) -> PrefillConstants:
    """Constants of mla_prefill_expand_narrow and mla_prefill_attend."""
    whole = prefill_constants(heads, cache.rank, rope, nope, value, page)
    own = {"FORMAT": CODES[cache.format], "GROUP": cache.group}
    return replace(whole, expand={**whole.expand, **own})


# A tile is widened in registers, while the codes of the next one are on their way: larger ones spill on some chip.
_DECODE = tile(4, 3, BLOCK_H=16, BLOCK_N=16)
_DECODE_MANY = tile(8, 3, BLOCK_H=32, BLOCK_N=32)  # for more than 16 heads
_DECODE_F32 = tile(8, 1, BLOCK_H=16, BLOCK_N=16)
_WRITE = tile(4, BLOCK_S=4)


def narrow_write_tile(steps: int, sm: int) -> Tile:
    """The tile of latent_narrow."""
    return tile(BLOCK_S=min(next_power_of_2(steps), 64)) if sm == INTERPRETER else _WRITE


def narrow_decode_tile(dtype: str, heads: int, sm: int, capacity: int, page: int) -> Tile:
    """The tile of mla_decode_split_narrow."""
    if sm == INTERPRETER:
        return tiles.decode_tile(dtype, heads, sm, capacity, page)
    if dtype == "float32":
        return _DECODE_F32
    return _DECODE if heads <= 16 else _DECODE_MANY


def narrow_expand_tile(dtype: str, cache: NarrowCache, capacity: int, sm: int) -> Tile:
    """The tile of mla_prefill_expand_narrow: a step of it has columns of one scale."""
    whole = tiles.prefill_expand_tile(dtype, cache.rank, capacity, sm)
    step = min(whole["BLOCK_K"], dot_size(cache.group))
    return tile(whole.num_warps, whole.num_stages, BLOCK_T=whole["BLOCK_T"], BLOCK_K=step)
