"""What MlaDecode's kernels over whole and narrow caches share: one piece of a sequence for a tile of queries."""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.bounds import pages_of_tile
from deepseek_trt.plugins.kernels.cache.codes import widened

WHOLE = tl.constexpr(-1)  # the FORMAT of latents that are no codes


@triton.jit
def _tile_of(
    pool,
    rest,
    page,
    first,
    end,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Codes [BLOCK_N, BLOCK_L], scales [BLOCK_N, BLOCK_G] and rope keys [BLOCK_N, BLOCK_R] of tokens from `first` on.

    `page` is pages_of_tile's. Tokens from `end` on are 0.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    IN_A_PAGE: tl.constexpr = PAGE % BLOCK_N == 0
    place = page * PAGE + (first % PAGE + offs_n if IN_A_PAGE else (first + offs_n) % PAGE)
    mask_n = (first + offs_n < end)[:, None]
    rows = rest + (place * (ROPE + GROUPS))[:, None]
    codes = tl.load(pool + (place * LAT)[:, None] + offs_l[None, :], mask=mask_n & (offs_l < LAT)[None, :], other=0)
    scales = tl.load(rows + ROPE + offs_g[None, :], mask=mask_n & (offs_g < GROUPS)[None, :], other=0.0)
    return codes, scales, tl.load(rows + offs_r[None, :], mask=mask_n & (offs_r < ROPE)[None, :], other=0.0)


@triton.jit
def attend_piece(
    query,
    latent,
    pool,
    rest,
    page_table,
    partial,
    partial_lse,
    attended,
    scale_log2,
    row,
    past,
    length,
    start,
    end,
    steps,
    table_width,
    pages,
    H: tl.constexpr,
    LAT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):
    """Tokens `start` to `end` of `row` for BLOCK_H queries, to the piece's slot or, of a whole sequence, `attended`.

    The pool has latents and rope keys, and new tokens are read from `latent`; or codes, beside which `rest` has rope
    keys and scales, and all tokens are read there.
    """
    D: tl.constexpr = LAT + ROPE
    GROUPS: tl.constexpr = LAT // GROUP
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)  # of S * H
    offs_l = tl.arange(0, BLOCK_L)
    offs_r = tl.arange(0, BLOCK_R)
    mask_h = offs_h < steps * H
    last = tl.minimum(past + offs_h // H, length - 1)  # that each query sees
    mask_l = offs_l < LAT
    mask_r = offs_r < ROPE
    head = row.to(tl.int64) * steps * H + offs_h
    q_ptrs = query + head[:, None] * D
    q_latent = tl.load(q_ptrs + offs_l[None, :], mask=mask_h[:, None] & mask_l[None, :], other=0.0)
    q_rope = tl.load(q_ptrs + LAT + offs_r[None, :], mask=mask_h[:, None] & mask_r[None, :], other=0.0)

    top = tl.full((BLOCK_H,), -3.0e38, tl.float32)  # finite: a query may see nothing here
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_L), tl.float32)
    page = pages_of_tile(page_table, row, start, end, table_width, pages, PAGE, BLOCK_N)
    new_rows = latent + row.to(tl.int64) * steps * D
    if FORMAT != WHOLE:  # the next tile is on its way, in registers, while the one at hand is used
        codes, scales, ropes = _tile_of(
            pool, rest, page, start, end, LAT, ROPE, GROUPS, PAGE, BLOCK_L, BLOCK_R, BLOCK_G, BLOCK_N
        )
        page = pages_of_tile(page_table, row, start + BLOCK_N, end, table_width, pages, PAGE, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        AHEAD: tl.constexpr = BLOCK_N if FORMAT == WHOLE else 2 * BLOCK_N
        next_page = pages_of_tile(page_table, row, first + AHEAD, end, table_width, pages, PAGE, BLOCK_N)
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        if FORMAT == WHOLE:
            if PAGE % BLOCK_N == 0:  # the tile's rows lie one after the other, in the page as in `latent`
                offs_t = tl.arange(0, BLOCK_N)
                old_rows = pool + (page * PAGE + first % PAGE) * D
                k_rows = tl.where(offs_t < past - first, old_rows, new_rows + (first - past) * D) + offs_t * D
            else:
                old_rows = pool + (page * PAGE + offs_n % PAGE) * D
                k_rows = tl.where(offs_n < past, old_rows, new_rows + (offs_n - past) * D)
            k_ptrs = k_rows[:, None]
            k_latent = tl.load(k_ptrs + offs_l[None, :], mask=mask_n[:, None] & mask_l[None, :], other=0.0)
            k_rope = tl.load(k_ptrs + LAT + offs_r[None, :], mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        else:  # new tokens, too, lie in the pools
            k_latent, k_rope = widened(codes, scales, rest.dtype.element_ty, BLOCK_G, BLOCK_GROUP, FORMAT), ropes
            codes, scales, ropes = _tile_of(
                pool, rest, page, first + BLOCK_N, end, LAT, ROPE, GROUPS, PAGE, BLOCK_L, BLOCK_R, BLOCK_G, BLOCK_N
            )
        scores = tl.dot(q_latent, k_latent.T, input_precision="ieee")
        scores = tl.dot(q_rope, k_rope.T, scores, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
        seen = mask_n[None, :] & (offs_n[None, :] <= last[:, None])
        scores = tl.where(seen, scores * scale_log2, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(k_latent.dtype), k_latent, acc * shrink[:, None], input_precision="ieee")
        top = new_top
        page = next_page

    mask_out = mask_h[:, None] & mask_l[None, :]
    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    if (start == 0) & (end == length):
        out_ptrs = attended + head[:, None] * LAT + offs_l[None, :]
        tl.store(out_ptrs, (acc / divisor).to(attended.dtype.element_ty), mask=mask_out)
    else:
        slot = tl.program_id(1).to(tl.int64) * steps * H + offs_h
        tl.store(partial + slot[:, None] * LAT + offs_l[None, :], acc / divisor, mask=mask_out)
        tl.store(partial_lse + slot, top + tl.log2(total), mask=mask_h)
