"""MoeBiasedRouter: sigmoid scores, the best groups and experts by score plus bias, weights without; all in float32.

Launch, no workspace:

    moe_biased_router  grid (cdiv(T, BLOCK_T), 1, 1)
        logits *fp32 [T, E], correction_bias *fp32 [E], weights *fp32 [T, K], ids *i32 [T, K], tokens i32 = T,
        scale fp32 = routed_scaling_factor

A NaN among a token's logits or the biases makes its weights NaN, but its ids stay in range: they index memory
afterwards.
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
def biased_choice(
    x,
    bias,
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
    """Of logits x [BLOCK_T, BLOCK_G, BLOCK_E] and bias [BLOCK_G, BLOCK_E], both 0 where no expert is: the chosen
    experts' weights and ids.

    Best first. Third, which choice each expert is, [BLOCK_T, BLOCK_G * BLOCK_E], or -1.
    """
    SIZE: tl.constexpr = E // GROUPS
    DROPPED: tl.constexpr = -3.0e38  # experts of groups that are not kept: below every score, above what is no expert
    NONE: tl.constexpr = -float("inf")
    offs_g = tl.arange(0, BLOCK_G)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    offs_all = tl.arange(0, BLOCK_G * BLOCK_E)
    real = ((offs_g[:, None] < GROUPS) & (offs_e[None, :] < SIZE))[None, :, :]

    scores = 1.0 / (1.0 + tl.exp(-x))  # [BLOCK_T, BLOCK_G, BLOCK_E]
    biased = scores + bias[None, :, :]
    usable = tl.abs(biased) < float("inf")  # false for NaN as well
    bad = tl.max(tl.max(tl.where(usable, 0, 1), 2), 1)  # [BLOCK_T]
    biased = tl.where((bad == 0)[:, None, None], biased, 0.0)
    biased = tl.where(real, biased, NONE)
    if TOPK_GROUPS < GROUPS:
        first, at_first = tl.max(biased, 2, return_indices=True)  # [BLOCK_T, BLOCK_G]
        others = tl.where(offs_e[None, None, :] == at_first[:, :, None], NONE, biased)
        best = first + tl.max(others, 2) if SIZE > 1 else first
        best = tl.where(offs_g[None, :] < GROUPS, best, NONE)
        kept = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            _, group = tl.max(best, 1, return_indices=True)
            chosen = offs_g[None, :] == group[:, None]
            kept = tl.where(chosen, 1, kept)
            best = tl.where(chosen, NONE, best)
        biased = tl.where(real & (kept[:, :, None] == 0), DROPPED, biased)

    left = tl.reshape(biased, (BLOCK_T, BLOCK_G * BLOCK_E))
    plain = tl.reshape(scores, (BLOCK_T, BLOCK_G * BLOCK_E))
    best_scores = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    best_ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    rank = tl.full((BLOCK_T, BLOCK_G * BLOCK_E), -1, tl.int32)
    for k in tl.static_range(TOPK):
        _, at = tl.max(left, 1, return_indices=True)  # of equal scores the first
        is_k = offs_k[None, :] == k
        is_chosen = offs_all[None, :] == at[:, None]
        score = tl.sum(tl.where(is_chosen, plain, 0.0), 1)
        best_scores = tl.where(is_k, score[:, None], best_scores)
        best_ids = tl.where(is_k, ((at // BLOCK_E) * SIZE + at % BLOCK_E)[:, None], best_ids)
        rank = tl.where(is_chosen, k, rank)
        left = tl.where(is_chosen, NONE, left)
    if NORMALISE:
        best_scores = best_scores / (tl.sum(best_scores, 1) + 1e-20)[:, None]
    best_scores = tl.where((bad == 0)[:, None], best_scores * scale, float("nan"))
    return best_scores, best_ids, rank


@triton.jit
def moe_biased_router(
    logits,
    correction_bias,
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
    is_expert = (offs_g[:, None] < GROUPS) & (offs_e[None, :] < SIZE)
    real = is_expert[None, :, :]
    row = offs_t.to(tl.int64)
    x_ptrs = logits + row[:, None, None] * E + expert[None, :, :]
    x = tl.load(x_ptrs, mask=mask_t[:, None, None] & real, other=0.0)
    bias = tl.load(correction_bias + expert, mask=is_expert, other=0.0)

    best_scores, best_ids, _ = biased_choice(
        x, bias, scale, E, GROUPS, TOPK_GROUPS, TOPK, NORMALISE, BLOCK_G, BLOCK_E, BLOCK_K, BLOCK_T
    )

    out = row[:, None] * TOPK + offs_k[None, :]
    mask = mask_t[:, None] & mask_k[None, :]
    tl.store(weights + out, best_scores, mask=mask)
    tl.store(ids + out, best_ids, mask=mask)


def run(
    logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """What export.ops.moe_biased_router's reference computes, by the kernel: weights float32 and ids int32 [T, K]."""
    import torch

    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
    if tokens == 0:
        return weights, ids
    constants = router_constants(experts, n_group, topk_group, top_k, norm_topk_prob)
    tile = router_tile(tokens, chip_of(logits))
    moe_biased_router[(cdiv(tokens, tile["BLOCK_T"]),)](
        logits.float().contiguous(),
        correction_bias.float().contiguous(),
        weights,
        ids,
        tokens,
        float(routed_scaling_factor),
        **constants,
        **tile.launch_options(),
    )
    return weights, ids
