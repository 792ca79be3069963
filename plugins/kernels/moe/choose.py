"""MoeLayer's second launch: from logits to each token's experts, their weights, and the order of the slots.

A token has K slots for the experts that it chooses and SHARED for the shared ones, which all tokens choose with weight
1 and whose ids follow those of the others: slot = token * (K + SHARED) + rank. Up to the tokens of its bucket one
program (SORT 1) also does what moe_dispatch's three kernels do, in registers; above (SORT 0) they follow.

Launch, BLOCK_T and SORT from the variant of the token bucket; N = K + SHARED, and blocks as moe_dispatch has it for
T * N slots of E + SHARED experts:

    moe_choose  grid (cdiv(T, BLOCK_T), 1, 1)
        partial *fp32, correction_bias *fp32 [E] (read where BIASED is 1), weights *fp32 (workspace 2), ids *i32
        (workspace 3), sorted_slots *i32, block_expert *i32, tokens i32 = T, max_blocks i32 = blocks,
        block i32 = BLOCK_M of the chosen moe_layer_gate_up variant,
        scale fp32 = routed_scaling_factor

    workspace 2: T * N * 4 bytes, weights [T, N]; 3: the same, ids [T, N], written where SORT is 0.
sorted_slots and block_expert are as moe_dispatch leaves them, but that sorted_slots of unused blocks, which nobody
reads, are not written.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.moe_biased_router import biased_choice
from deepseek_trt.plugins.kernels.moe_router import softmax_choice
from deepseek_trt.plugins.kernels.order import after_previous_kernel


@triton.jit
def sort_slots(
    rank,
    mask_t,
    offs_t,
    sorted_slots,
    block_expert,
    tokens,
    max_blocks,
    block,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The slots of all tokens by expert, each expert's padded to whole blocks; rank as softmax_choice gives it."""
    SIZE: tl.constexpr = E // GROUPS
    SLOTS: tl.constexpr = TOPK + SHARED
    chosen = (rank >= 0) & mask_t[:, None]
    member = chosen.to(tl.int32)
    count = tl.sum(member, 0)
    padded = (count + block - 1) // block * block
    end = tl.cumsum(padded, 0)
    at = end - padded
    place = at[None, :] + tl.cumsum(member, 0) - member
    tl.store(sorted_slots + place, offs_t[:, None] * SLOTS + rank, mask=chosen)

    nothing = tokens * SLOTS
    for unused in range(0, block):
        tl.store(sorted_slots + at + count + unused, count * 0 + nothing, mask=count + unused < padded)

    used = tl.sum(padded, 0)
    rows = (tokens + block - 1) // block * block  # of each shared expert
    for shared in tl.static_range(SHARED):
        for first in range(0, rows, BLOCK_T):
            row = first + tl.arange(0, BLOCK_T)
            slot = tl.where(row < tokens, row * SLOTS + TOPK + shared, nothing)
            tl.store(sorted_slots + used + shared * rows + row, slot, mask=row < rows)

    for first in range(0, max_blocks, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        start = offs_b * block
        passed = tl.sum((start[:, None] >= end[None, :]).to(tl.int32), 1)
        routed = passed // BLOCK_E * SIZE + passed % BLOCK_E
        shared_owner = E + (start - used) // rows
        owner = tl.where(start < used, routed, tl.where(shared_owner < E + SHARED, shared_owner, -1))
        tl.store(block_expert + offs_b, owner, mask=offs_b < max_blocks)


@triton.jit
def moe_choose(
    partial,
    correction_bias,
    weights,
    ids,
    sorted_slots,
    block_expert,
    tokens,
    max_blocks,
    block,
    scale,
    E: tl.constexpr,
    SHARED: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SORT: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_T tokens; experts lie as [BLOCK_G groups, BLOCK_E experts a group], both padded to powers of two."""
    after_previous_kernel(PDL)
    SIZE: tl.constexpr = E // GROUPS
    SLOTS: tl.constexpr = TOPK + SHARED
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_g = tl.arange(0, BLOCK_G)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < tokens
    expert = offs_g[:, None] * SIZE + offs_e[None, :]
    is_expert = (offs_g[:, None] < GROUPS) & (offs_e[None, :] < SIZE)
    real = is_expert[None, :, :]
    row = offs_t.to(tl.int64)

    x = tl.zeros((BLOCK_T, BLOCK_G, BLOCK_E), tl.float32)
    for split in tl.static_range(SPLITS):
        at = (row + split * tokens.to(tl.int64))[:, None, None] * E + expert[None, :, :]
        x += tl.load(partial + at, mask=mask_t[:, None, None] & real, other=0.0)
    if BIASED:
        bias = tl.load(correction_bias + expert, mask=is_expert, other=0.0)
        best, chosen, rank = biased_choice(
            x, bias, scale, E, GROUPS, TOPK_GROUPS, TOPK, NORMALISE, BLOCK_G, BLOCK_E, BLOCK_K, BLOCK_T
        )
    else:
        x = tl.where(mask_t[:, None, None] & real, x, -float("inf"))
        best, chosen, rank = softmax_choice(
            x, mask_t, scale, E, GROUPS, TOPK_GROUPS, TOPK, NORMALISE, BLOCK_G, BLOCK_E, BLOCK_K, BLOCK_T
        )

    best = tl.where(offs_k[None, :] < TOPK, best, 1.0)
    chosen = tl.where(offs_k[None, :] < TOPK, chosen, E + offs_k[None, :] - TOPK)
    out = row[:, None] * SLOTS + offs_k[None, :]
    mask = mask_t[:, None] & (offs_k[None, :] < SLOTS)
    tl.store(weights + out, best, mask=mask)
    if SORT:
        sort_slots(
            rank,
            mask_t,
            offs_t,
            sorted_slots,
            block_expert,
            tokens,
            max_blocks,
            block,
            E,
            SHARED,
            GROUPS,
            TOPK,
            BLOCK_E,
            BLOCK_T,
            BLOCK_B,
        )
    else:
        tl.store(ids + out, chosen, mask=mask)
