"""MlaQuery: absorbed queries and the latents to be cached, from the projections; decode's first steps in one launch.

A head's query is q_nope W_UK, rounded once, then its rotated rope part; a token's latent is its normalised latent, then
its rotated rope part. Norm and rotation are in float32 and rounded once (torch rounds the same numbers).

Launch, BLOCK_L and BLOCK_T from the variant of the token bucket; T = B * S tokens:

    mla_query  grid (H * cdiv(L, BLOCK_L) + 1, cdiv(T, BLOCK_T), 1)
        q *T [T, H * (N + R)], kv *T [T, L + R], cos *fp32 [T, R / 2], sin *fp32 [T, R / 2], latent_norm *T [L],
        w_uk *T [H, N, L], query *T [T, H, L + R], latent *T [T, L + R], tokens i32 = T, eps fp32

The last program of a row of the grid makes the latents; of a head's programs the first rotates as well.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.absorbed.constants import AbsorbedSizes, query_constants, query_tiles, tile_for
from deepseek_trt.plugins.kernels.chips import chip_of
from deepseek_trt.plugins.kernels.launches import cdiv
from deepseek_trt.plugins.kernels.order import after_previous_kernel

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def rotate(source, target, cos, sin, offs_t, mask_t, RHALF: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rotate adjacent pairs at source [BLOCK_T, 1] + 0..R-1 to target, by each token's angles."""
    offs_r = tl.arange(0, BLOCK_R)
    mask = mask_t[:, None] & (offs_r < RHALF)[None, :]
    angle = offs_t[:, None] * RHALF + offs_r[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    first = tl.load(source + 2 * offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + 2 * offs_r[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target + 2 * offs_r[None, :], (first * c - second * s).to(dtype), mask=mask)
    tl.store(target + 2 * offs_r[None, :] + 1, (first * s + second * c).to(dtype), mask=mask)


@triton.jit
def mla_query(
    q,
    kv,
    cos,
    sin,
    latent_norm,
    w_uk,
    query,
    latent,
    tokens,
    eps,
    H: tl.constexpr,
    LAT: tl.constexpr,
    RHALF: tl.constexpr,
    NOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_LAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_T tokens: BLOCK_L columns of one head's queries, or the latents."""
    after_previous_kernel(PDL)
    COLUMNS: tl.constexpr = (LAT + BLOCK_L - 1) // BLOCK_L
    ROPE: tl.constexpr = 2 * RHALF
    D: tl.constexpr = LAT + ROPE
    head = tl.program_id(0) // COLUMNS
    column = tl.program_id(0) % COLUMNS
    offs_t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_t = offs_t < tokens

    if head < H:
        offs_l = column * BLOCK_L + tl.arange(0, BLOCK_L)
        mask_l = offs_l < LAT
        q_ptrs = q + (offs_t * H + head)[:, None] * (NOPE + ROPE)
        acc = tl.zeros((BLOCK_T, BLOCK_L), tl.float32)
        for first in range(0, NOPE, BLOCK_K):
            offs_k = first + tl.arange(0, BLOCK_K)
            mask_k = offs_k < NOPE
            x = tl.load(q_ptrs + offs_k[None, :], mask=mask_t[:, None] & mask_k[None, :], other=0.0)
            w_ptrs = w_uk + (head * NOPE + offs_k)[:, None] * LAT + offs_l[None, :]
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_l[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        out = query + (offs_t * H + head)[:, None] * D
        tl.store(out + offs_l[None, :], acc.to(query.dtype.element_ty), mask=mask_t[:, None] & mask_l[None, :])
        if column == 0:
            rotate(q_ptrs + NOPE, out + LAT, cos, sin, offs_t, mask_t, RHALF, BLOCK_R)
    else:
        offs_c = tl.arange(0, BLOCK_LAT)
        mask_c = offs_c < LAT
        norm = tl.load(latent_norm + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        for row in range(0, BLOCK_T):
            token = (tl.program_id(1) * BLOCK_T + row).to(tl.int64)
            mask = mask_c & (token < tokens)
            x = tl.load(kv + token * D + offs_c, mask=mask, other=0.0).to(tl.float32)
            scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / LAT + eps)
            tl.store(latent + token * D + offs_c, (x * scale * norm).to(latent.dtype.element_ty), mask=mask)
        rope = offs_t[:, None] * D + LAT
        rotate(kv + rope, latent + rope, cos, sin, offs_t, mask_t, RHALF, BLOCK_R)


def run(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, latent_norm: Tensor, w_uk: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What plugins.fused.mla_query.mla_query computes, by the kernel: query [B, S, H, D] and latent [B, S, D]."""
    (batch, seq, half), (heads, nope, rank) = cos.shape, w_uk.shape
    tokens, width = batch * seq, rank + 2 * half
    query, latent = q.new_empty((batch, seq, heads, width)), q.new_empty((batch, seq, width))
    sizes = AbsorbedSizes(heads, rank, 2 * half, nope, 0)
    tile = tile_for(query_tiles(sizes, chip_of(q)), tokens)
    mla_query[(heads * cdiv(rank, tile["BLOCK_L"]) + 1, cdiv(tokens, tile["BLOCK_T"]))](
        q.contiguous(),
        kv.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        latent_norm,
        w_uk.contiguous(),
        query,
        latent,
        tokens,
        float(eps),
        **query_constants(sizes),
        **tile.launch_options(),
    )
    return query, latent
