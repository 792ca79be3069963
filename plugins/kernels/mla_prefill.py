"""MlaPrefill: causal attention of many new tokens over the paged latents, expanded to keys and values first.

Expanded scores cost 2 (N + R + V) flops a query, key and head, absorbed ones 2 (2 L + R): 3.4 times more for 128, 64,
128 and 512. Expansion costs 2 L (N + V) flops a key and head, once; absorbed wins only where fewer than about
170 new tokens meet a long cache, and the workspace is the price. Heads are expanded a chunk at a time to bound it.

Launches, after latent_write on the present pool. BLOCK_T, BLOCK_M from the variants; T = M * page;
chunk = launches.prefill_chunk_heads = max(1, min(H, 2**30 / (B * T * (N + V) * sizeof(T)))); for each first = 0, chunk,
2 * chunk, ... below H, with heads = min(chunk, H - first), both kernels after each other on one stream:

    mla_prefill_expand  grid (cdiv(T, BLOCK_T), heads, B)
        pool *T (present), page_table *i32, past_lengths *i32, sequence_lengths *i32, w_uk *T [H, N, L],
        w_uv *T [H, V, L], k_nope *T (workspace 1), value *T (workspace 2), k_rope *T (workspace 3),
        first_head i32 = first, capacity i32 = T, table_width i32 = M, pages i32 = P, steps i32 = S
    mla_prefill_attend  grid (cdiv(S, BLOCK_M), heads, B)
        query *T [B, S, H, N + R], past_lengths *i32, sequence_lengths *i32, k_nope *T, value *T, k_rope *T,
        attended *T [B, S, H * V], scale_log2 fp32 = scale * log2(e), first_head i32 = first, steps i32 = S,
        capacity i32 = T

    workspace 1: B * chunk * T * N * sizeof(T) bytes, [B, heads, T, N]; workspace 2: the same with V for N;
    workspace 3: B * T * R * sizeof(T) bytes, [B, T, R], written with head 0 and read with all.
    The first two together are at most max(2**30, B * T * (N + V) * sizeof(T)) bytes.
The rope keys are copied out of the pages so that the loop over the keys has no page table in it: what it loads lies in
rows one after the other, and loads run ahead of the math (benchmarks/kernel_code.py shows it).
Rows beyond a sequence's length are neither expanded nor read. Query rows that are padding get finite numbers.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import clamp_int
from deepseek_trt.plugins.kernels.cache.attend import WHOLE
from deepseek_trt.plugins.kernels.cache.expand import expand_tokens
from deepseek_trt.plugins.kernels.chips import chip_of, dtype_name
from deepseek_trt.plugins.kernels.constants import PrefillConstants, prefill_constants
from deepseek_trt.plugins.kernels.latent_write import write
from deepseek_trt.plugins.kernels.launches import cdiv, head_chunks, prefill_chunk_heads
from deepseek_trt.plugins.kernels.order import after_previous_kernel
from deepseek_trt.plugins.kernels.tiles import Tile, prefill_attend_tile, prefill_expand_tile

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def mla_prefill_expand(
    pool,
    page_table,
    past_lengths,
    sequence_lengths,
    w_uk,
    w_uv,
    k_nope,
    value,
    k_rope,
    first_head,
    capacity,
    table_width,
    pages,
    steps,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Keys and values of BLOCK_T cached tokens for one head: c W_UK^T and c W_UV^T; and all heads' rope keys, once."""
    after_previous_kernel(PDL)
    row = tl.program_id(2)
    past = clamp_int(tl.load(past_lengths + row), capacity)
    length = past + clamp_int(tl.load(sequence_lengths + row), tl.minimum(steps, capacity - past))
    if tl.program_id(0) * BLOCK_T >= length:
        return
    expand_tokens(
        pool,
        pool + LAT,
        page_table,
        w_uk,
        w_uv,
        k_nope,
        value,
        k_rope,
        row,
        length,
        first_head,
        capacity,
        table_width,
        pages,
        LAT,
        ROPE,
        NOPE,
        VALUE,
        PAGE,
        BLOCK_NOPE,
        BLOCK_R,
        BLOCK_V,
        BLOCK_T,
        BLOCK_K,
        WHOLE,
        LAT,
        LAT + ROPE,
        LAT + ROPE,
    )


@triton.jit
def mla_prefill_attend(
    query,
    past_lengths,
    sequence_lengths,
    k_nope,
    value,
    k_rope,
    attended,
    scale_log2,
    first_head,
    steps,
    capacity,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """BLOCK_M queries of one head against all tokens they may see."""
    after_previous_kernel(PDL)
    Q: tl.constexpr = NOPE + ROPE
    row = tl.program_id(2)
    past = clamp_int(tl.load(past_lengths + row), capacity)
    new = clamp_int(tl.load(sequence_lengths + row), tl.minimum(steps, capacity - past))
    head = first_head + tl.program_id(1)
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows start first
    offs_m = first_query + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_NOPE)
    offs_r = tl.arange(0, BLOCK_R)
    offs_v = tl.arange(0, BLOCK_V)
    mask_m = offs_m < steps
    mask_c = offs_c < NOPE
    mask_r = offs_r < ROPE
    mask_v = offs_v < VALUE
    q_row = (row.to(tl.int64) * steps + offs_m) * H + head
    q_ptrs = query + q_row[:, None] * Q
    q_nope = tl.load(q_ptrs + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
    q_rope = tl.load(q_ptrs + NOPE + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    cached = row.to(tl.int64) * capacity
    expanded = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * capacity

    # Tokens that some real query of this tile sees. A tile of padding alone sees none and writes zeros.
    end = past + tl.minimum(first_query + BLOCK_M, new)
    end = tl.where(first_query < new, end, 0)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for first in range(0, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        token = expanded + offs_n
        k_ptrs = k_nope + token[:, None] * NOPE
        r_ptrs = k_rope + (cached + offs_n)[:, None] * ROPE
        v_ptrs = value + token[:, None] * VALUE
        keys = tl.load(k_ptrs + offs_c[None, :], mask=mask_n[:, None] & mask_c[None, :], other=0.0)
        ropes = tl.load(r_ptrs + offs_r[None, :], mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        scores = tl.dot(q_nope, keys.T, input_precision="ieee")
        scores = tl.dot(q_rope, ropes.T, scores, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        seen = mask_n[None, :] & (offs_n[None, :] <= past + offs_m[:, None])
        scores = tl.where(seen, scores * scale_log2, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every query sees token 0, which is in the first tile
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v_ptrs + offs_v[None, :], mask=mask_n[:, None] & mask_v[None, :], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptrs = attended + q_row[:, None] * VALUE + offs_v[None, :]
    tl.store(out_ptrs, acc.to(attended.dtype.element_ty), mask=mask_m[:, None] & mask_v[None, :])


def run(
    query: Tensor,
    latent: Tensor,
    past_latent: Tensor,
    page_table: Tensor,
    past_lengths: Tensor,
    sequence_lengths: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What export.ops.mla_prefill.mla_prefill computes, by the kernels: attended [B, S, H * V] and the present pool."""
    present = write(past_latent, latent, page_table, past_lengths, sequence_lengths)
    nope, rank, value_dim = w_uk.shape[1], w_uk.shape[2], w_uv.shape[1]
    rope, page_size = query.shape[3] - nope, past_latent.shape[1]
    constants = prefill_constants(query.shape[2], rank, rope, nope, value_dim, page_size)
    tile = prefill_expand_tile(dtype_name(query), rank, page_table.shape[1] * page_size, chip_of(query))
    expand = Expand(mla_prefill_expand, (present,), constants, tile, page_size)
    lengths = past_lengths, sequence_lengths
    return launch_heads(expand, query, page_table, lengths, w_uk, w_uv, scale), present


@dataclass(frozen=True)
class Expand:
    """An expanding kernel, the pools that it reads, and what it and the attending one are told."""

    kernel: Any
    pools: tuple[Tensor, ...]
    constants: PrefillConstants
    tile: Tile
    page_size: int


def launch_heads(
    expand: Expand,
    query: Tensor,
    page_table: Tensor,
    lengths: tuple[Tensor, Tensor],
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
) -> Tensor:
    """Launch both for all heads, a chunk at a time: attended [B, S, H * V]."""
    query, page_table, w_uk, w_uv = (t.contiguous() for t in (query, page_table, w_uk, w_uv))
    batch, steps, heads, width = query.shape
    nope, value_dim, tile = w_uk.shape[1], w_uv.shape[1], expand.tile
    table_width, pages = page_table.shape[1], expand.pools[0].shape[0]
    capacity = table_width * expand.page_size
    attend = prefill_attend_tile(dtype_name(query), steps, capacity, chip_of(query))
    chunk = prefill_chunk_heads(batch, capacity, heads, (nope + value_dim) * query.element_size())
    k_nope = query.new_empty((batch, chunk, capacity, nope))
    value = query.new_empty((batch, chunk, capacity, value_dim))
    k_rope = query.new_empty((batch, capacity, width - nope))
    attended = query.new_empty((batch, steps, heads * value_dim))
    for part in head_chunks(heads, chunk):
        expand.kernel[(cdiv(capacity, tile["BLOCK_T"]), part.count, batch)](
            *expand.pools,
            page_table,
            *lengths,
            w_uk,
            w_uv,
            k_nope,
            value,
            k_rope,
            part.first,
            capacity,
            table_width,
            pages,
            steps,
            **expand.constants.expand,
            **tile.launch_options(),
        )
        mla_prefill_attend[(cdiv(steps, attend["BLOCK_M"]), part.count, batch)](
            query,
            *lengths,
            k_nope,
            value,
            k_rope,
            attended,
            scale * math.log2(math.e),
            part.first,
            steps,
            capacity,
            **expand.constants.attend,
            **attend.launch_options(),
        )
    return attended
