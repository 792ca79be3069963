"""MoeRouter: softmax over the experts' logits, the best groups, the best experts, their weights; all in float32.

Launch, no workspace:

    moe_router  grid (cdiv(T, BLOCK_T), 1, 1)
        logits *fp32 [T, E], weights *fp32 [T, K], ids *i32 [T, K], tokens i32 = T,
        scale fp32 = routed_scaling_factor (not read when NORMALISE is 1)

A NaN among a token's logits makes its weights NaN, but its ids stay in range: they index memory afterwards.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.constants import router_constants
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import router_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def softmax_choice(
    x,
    mask_t,
    scale,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of logits x [BLOCK_T, BLOCK_G, BLOCK_E], -inf where no expert is: the chosen experts' weights and ids.

    Best first. Third, which choice each expert is, [BLOCK_T, BLOCK_G * BLOCK_E], or -1.
    """
    SIZE: tl.constexpr = E // GROUPS
    offs_g = tl.arange(0, BLOCK_G)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    offs_all = tl.arange(0, BLOCK_G * BLOCK_E)
    real = ((offs_g[:, None] < GROUPS) & (offs_e[None, :] < SIZE))[None, :, :]

    largest = tl.max(tl.max(x, 2), 1)
    largest = tl.where(mask_t, largest, 0.0)
    x = tl.exp(x - largest[:, None, None])  # [BLOCK_T, BLOCK_G, BLOCK_E]
    sums = tl.sum(tl.sum(x, 2), 1)
    poison = sums - sums  # NaN where a logit is NaN or infinite, else 0
    scores = x / tl.where(mask_t, sums, 1.0)[:, None, None]
    scores = tl.where((poison == 0.0)[:, None, None], scores, 0.0)
    if TOPK_GROUPS < GROUPS:
        best = tl.max(scores, 2)  # [BLOCK_T, BLOCK_G]
        best = tl.where(offs_g[None, :] < GROUPS, best, -1.0)
        kept = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            _, group = tl.max(best, 1, return_indices=True)
            chosen = offs_g[None, :] == group[:, None]
            kept = tl.where(chosen, 1, kept)
            best = tl.where(chosen, -2.0, best)
        scores = tl.where(kept[:, :, None] != 0, scores, 0.0)
    scores = tl.where(real, scores, -1.0)

    left = tl.reshape(scores, (BLOCK_T, BLOCK_G * BLOCK_E))
    best_scores = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    best_ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    rank = tl.full((BLOCK_T, BLOCK_G * BLOCK_E), -1, tl.int32)
    for k in tl.static_range(TOPK):
        score, at = tl.max(left, 1, return_indices=True)  # of equal scores the first
        is_k = offs_k[None, :] == k
        best_scores = tl.where(is_k, score[:, None], best_scores)
        best_ids = tl.where(is_k, ((at // BLOCK_E) * SIZE + at % BLOCK_E)[:, None], best_ids)
        is_chosen = offs_all[None, :] == at[:, None]
        rank = tl.where(is_chosen, k, rank)
        left = tl.where(is_chosen, -2.0, left)
    total = (tl.sum(best_scores, 1) + 1e-20)[:, None]
    best_scores = best_scores / total if NORMALISE else best_scores * scale
    best_scores += poison[:, None]
    return best_scores, best_ids, rank


@triton.jit
def moe_router(
    logits,
    weights,
    ids,
    tokens,
    scale,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_T tokens; experts lie as [BLOCK_G groups, BLOCK_E experts a group], both padded to powers of two."""
    after_previous_kernel(PDL)
    SIZE: tl.constexpr = E // GROUPS
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_g = tl.arange(0, BLOCK_G)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < tokens
    mask_k = offs_k < TOPK
    expert = offs_g[:, None] * SIZE + offs_e[None, :]
    real = ((offs_g[:, None] < GROUPS) & (offs_e[None, :] < SIZE))[None, :, :]
    row = offs_t.to(tl.int64)
    x_ptrs = logits + row[:, None, None] * E + expert[None, :, :]
    x = tl.load(x_ptrs, mask=mask_t[:, None, None] & real, other=-float("inf"))

    best_scores, best_ids, _ = softmax_choice(
        x, mask_t, scale, E, GROUPS, TOPK_GROUPS, TOPK, NORMALISE, BLOCK_G, BLOCK_E, BLOCK_K, BLOCK_T
    )

    out = row[:, None] * TOPK + offs_k[None, :]
    mask = mask_t[:, None] & mask_k[None, :]
    tl.store(weights + out, best_scores, mask=mask)
    tl.store(ids + out, best_ids, mask=mask)


def run(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """What export.ops.moe_router.moe_router computes, by the kernel: weights float32 [T, K] and ids int32 [T, K]."""
    import torch

    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
    if tokens == 0:
        return weights, ids
    constants = router_constants(experts, n_group, topk_group, top_k, norm_topk_prob)
    tile = router_tile(tokens, chip_of(logits))
    moe_router[(cdiv(tokens, tile["BLOCK_T"]),)](
        logits.float().contiguous(),
        weights,
        ids,
        tokens,
        float(routed_scaling_factor),
        **constants,
        **tile.launch_options(),
    )
    return weights, ids
