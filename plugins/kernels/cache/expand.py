"""What MlaPrefill's kernels over whole and narrow caches share: a tile of tokens as keys and values of a head."""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import page_of
from deepseek_trt.plugins.kernels.cache.attend import WHOLE
from deepseek_trt.plugins.kernels.cache.codes import numbers_of


@triton.jit
def expand_tokens(
    pool,
    rest,
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
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    POOL_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
):
    """Keys and values of BLOCK_T of `length` tokens for one head; with the first head, too, all heads' rope keys.

    Rows of the pool are latents, or codes; rows of `rest` begin with rope keys, behind which the codes' scales lie.
    """
    head = (first_head + tl.program_id(1)).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = tl.arange(0, BLOCK_NOPE)
    offs_v = tl.arange(0, BLOCK_V)
    mask_t = offs_t < length
    mask_n = offs_n < NOPE
    mask_v = offs_v < VALUE
    page = page_of(page_table, row, offs_t // PAGE, table_width, pages, mask_t)
    place = page * PAGE + offs_t % PAGE
    c_ptrs = pool + place[:, None] * POOL_WIDTH
    rest_ptrs = rest + place * REST_WIDTH
    k_ptrs = w_uk + (head * NOPE + offs_n)[:, None] * LAT
    v_ptrs = w_uv + (head * VALUE + offs_v)[:, None] * LAT

    acc_k = tl.zeros((BLOCK_T, BLOCK_NOPE), tl.float32)
    acc_v = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first_k in range(0, LAT, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < LAT
        if FORMAT == WHOLE:
            c = tl.load(c_ptrs + offs_k[None, :], mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        else:
            codes = tl.load(c_ptrs + offs_k[None, :], mask=mask_t[:, None] & mask_k[None, :], other=0)
            scale = tl.load(rest_ptrs + ROPE + first_k // GROUP, mask=mask_t, other=0.0).to(tl.float32)
            c = (numbers_of(codes, FORMAT) * scale[:, None]).to(k_nope.dtype.element_ty)
        uk = tl.load(k_ptrs + offs_k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        uv = tl.load(v_ptrs + offs_k[None, :], mask=mask_v[:, None] & mask_k[None, :], other=0.0)
        acc_k = tl.dot(c, uk.T, acc_k, input_precision="ieee")
        acc_v = tl.dot(c, uv.T, acc_v, input_precision="ieee")

    out = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * capacity + offs_t
    out_k = k_nope + out[:, None] * NOPE + offs_n[None, :]
    out_v = value + out[:, None] * VALUE + offs_v[None, :]
    tl.store(out_k, acc_k.to(k_nope.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])
    tl.store(out_v, acc_v.to(value.dtype.element_ty), mask=mask_t[:, None] & mask_v[None, :])
    if head == 0:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = mask_t[:, None] & (offs_r < ROPE)[None, :]
        rope = tl.load(rest_ptrs[:, None] + offs_r[None, :], mask=mask_r, other=0.0)
        token = row.to(tl.int64) * capacity + offs_t
        tl.store(k_rope + token[:, None] * ROPE + offs_r[None, :], rope, mask=mask_r)
