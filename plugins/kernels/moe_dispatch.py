"""Dispatch, the first step of MoeExperts: a stable counting sort of the slots by expert, each expert block aligned.

A slot is one (token, rank) pair: slot = token * K + rank, n = T * K of them. No atomics: each chunk of slots is
counted, one program turns the counts into offsets, each chunk then scatters its own slots by rank. The result depends
on the ids alone, so that the same batch always gives the same bits.

Launches. n = T * K; chunks = cdiv(n, 128); block = BLOCK_M of the chosen moe_gate_up variant;
blocks = launches.dispatch_blocks(n, E, block) = (n + min(E, n) * (block - 1)) / block; sorted = blocks * block:

    moe_dispatch_count    grid (cdiv(sorted, 128), 1, 1)
        ids *i32 [n], counts *i32 (workspace 1), sorted_slots *i32 (workspace 4), slots i32 = n,
        sorted_size i32 = sorted
    moe_dispatch_offsets  grid (1, 1, 1)
        counts *i32, offsets *i32 (workspace 2), block_expert *i32 (workspace 3), chunks i32 = chunks,
        max_blocks i32 = blocks, block i32 = block
    moe_dispatch_scatter  grid (chunks, 1, 1)
        ids *i32, offsets *i32, sorted_slots *i32, slots i32 = n

    workspace 1 and 2: chunks * E * 4 bytes each; 3: blocks * 4; 4: sorted * 4; each rounded up to 256.
Afterwards sorted_slots holds each expert's slots in order, padded with n to whole blocks, then n; block_expert holds
the expert of each block, then -1. The kernels write every word of all four themselves.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import clamp_int
from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.constants import dispatch_constants
from deepseek_trt.plugins.kernels.launches import DISPATCH_CHUNK, cdiv, dispatch_blocks
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import dispatch_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def moe_dispatch_count(
    ids,
    counts,
    sorted_slots,
    slots,
    sorted_size,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """How often each expert occurs in one chunk, counts [chunks, E]; and CHUNK words of sorted_slots set to padding."""
    after_previous_kernel(PDL)
    chunk = tl.program_id(0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    offs_e = tl.arange(0, BLOCK_E)
    mask = offs < slots
    tl.store(sorted_slots + offs, tl.zeros((CHUNK,), tl.int32) + slots, mask=offs < sorted_size)

    if chunk * CHUNK < slots:
        expert = clamp_int(tl.load(ids + offs, mask=mask, other=0), E - 1)
        count = tl.histogram(expert, BLOCK_E, mask=mask)
        tl.store(counts + chunk * E + offs_e, count, mask=offs_e < E)


@triton.jit
def moe_dispatch_offsets(
    counts,
    offsets,
    block_expert,
    chunks,
    max_blocks,
    block,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Where a chunk's first slot of an expert goes, offsets [chunks, E]; and whose each block is, or -1."""
    after_previous_kernel(PDL)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, chunks, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = (offs_c < chunks)[:, None] & mask_e[None, :]
        total += tl.sum(tl.load(counts + offs_c[:, None] * E + offs_e[None, :], mask=mask, other=0), 0)
    padded = (total + block - 1) // block * block
    end = tl.cumsum(padded, 0)
    at = end - padded

    for first in range(0, chunks, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = (offs_c < chunks)[:, None] & mask_e[None, :]
        count = tl.load(counts + offs_c[:, None] * E + offs_e[None, :], mask=mask, other=0)
        before = tl.cumsum(count, 0) - count
        tl.store(offsets + offs_c[:, None] * E + offs_e[None, :], at[None, :] + before, mask=mask)
        at += tl.sum(count, 0)

    for first in range(0, max_blocks, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        passed = (offs_b * block)[:, None] >= end[None, :]
        owner = tl.sum((passed & mask_e[None, :]).to(tl.int32), 1)
        tl.store(block_expert + offs_b, tl.where(owner < E, owner, -1), mask=offs_b < max_blocks)


@triton.jit
def moe_dispatch_scatter(
    ids,
    offsets,
    sorted_slots,
    slots,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Each slot of one chunk to its place: its expert's offset, plus that expert's slots before it in the chunk."""
    after_previous_kernel(PDL)
    chunk = tl.program_id(0)
    offs = tl.arange(0, CHUNK)
    slot = chunk * CHUNK + offs
    mask = slot < slots
    expert = clamp_int(tl.load(ids + slot, mask=mask, other=0), E - 1)
    other = clamp_int(tl.load(ids + slot, mask=mask, other=0), E - 1)

    earlier = (expert[:, None] == other[None, :]) & (offs[None, :] < offs[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)

    place = tl.load(offsets + chunk * E + expert, mask=mask, other=0) + rank
    tl.store(sorted_slots + place, slot, mask=mask)


@dataclass(frozen=True)
class Dispatch:
    """Slots in the order of their experts: sorted_slots [blocks * block], and whose each block is, [blocks]."""

    sorted_slots: Tensor
    block_expert: Tensor
    block: int

    @property
    def blocks(self) -> int:
        """How many blocks there are, unused ones at the end included."""
        return self.block_expert.shape[0]


def dispatch(ids: Tensor, experts: int, block: int) -> Dispatch:
    """Sort the slots of ids int32 [T, K] by expert into blocks of `block` rows."""
    slots = ids.numel()
    chunks = cdiv(slots, DISPATCH_CHUNK)
    blocks = dispatch_blocks(slots, experts, block)
    counts, offsets = ids.new_empty((chunks, experts)), ids.new_empty((chunks, experts))
    block_expert, sorted_slots = ids.new_empty(blocks), ids.new_empty(blocks * block)
    constants = dispatch_constants(experts)
    tile = dispatch_tile(chip_of(ids))
    ids = ids.contiguous()
    moe_dispatch_count[(cdiv(blocks * block, DISPATCH_CHUNK),)](
        ids, counts, sorted_slots, slots, blocks * block, **constants.count, num_warps=4
    )
    moe_dispatch_offsets[(1,)](
        counts, offsets, block_expert, chunks, blocks, block, **constants.offsets, **tile.launch_options()
    )
    moe_dispatch_scatter[(chunks,)](ids, offsets, sorted_slots, slots, **constants.scatter, num_warps=4)
    return Dispatch(sorted_slots, block_expert, block)
