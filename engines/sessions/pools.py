"""Pools of a narrow cache as numbers, for whoever looks into a session's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_trt.export.arrays import E4M3, Array, numpy_dtype
from deepseek_trt.export.bundle.graph import CacheSpec


def shapes_of(cache: CacheSpec, pages: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and numpy's dtype of every pool, layer by layer."""
    each: list[tuple[tuple[int, ...], Any]] = [
        ((pages, cache.page_size, pool.width), np.dtype(numpy_dtype(pool.dtype))) for pool in cache.pools
    ]
    return each * cache.layers


def numbers_of(cache: CacheSpec, pools: Sequence[Array]) -> Array:
    """The latents [.., D] that rows of a layer's pools stand for: the one pool itself where the cache is whole, else a
    copy that cannot be written, as nothing would come of it.
    """
    if cache.narrow is None:
        return pools[0]
    codes, rest = pools
    groups = cache.narrow.groups
    values = E4M3[codes.view(np.uint8)] if cache.narrow.format == "fp8" else codes.astype(np.float32)
    scales = rest[..., -groups:].astype(np.float32)
    grouped = values.reshape(*values.shape[:-1], groups, cache.narrow.group) * scales[..., None]
    latents = grouped.reshape(values.shape).astype(rest.dtype)
    numbers: Array = np.concatenate([latents, rest[..., :-groups]], axis=-1)
    numbers.flags.writeable = False
    return numbers


def fill_pools(pools: Sequence[Array], value: float) -> None:
    """Every number of the pools, which are written; codes become 127, whose scales then say the value."""
    for pool in pools:
        pool[:] = 127 if pool.dtype == np.int8 else value
