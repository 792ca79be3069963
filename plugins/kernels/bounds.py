"""What the paged kernels read from memory before they index memory with it, held within bounds.

The builder of TensorRT times plugins on made-up inputs, and a caller may be wrong: a length, a page or an expert out of
range must give wrong numbers, not touch foreign memory.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clamp_int(value, most):
    """`value`, at least 0 and at most `most`."""
    return tl.minimum(tl.maximum(value, 0), most)


@triton.jit
def page_of(page_table, row, entry, table_width, pages, mask):
    """The page, int64 and below `pages`, in entries `entry` of the row's table; 0 where `mask` is false."""
    page = tl.load(page_table + row * table_width + entry, mask=mask, other=0)
    return clamp_int(page, pages - 1).to(tl.int64)


@triton.jit
def pages_of_tile(page_table, row, first, end, table_width, pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages, int64 and below `pages`, of BLOCK_N tokens from `first` on: one for all where a tile lies in one page.

    0 for tokens from `end` on. `first` is a multiple of BLOCK_N. A loop that calls this for its next tile, and carries
    what it gives, addresses the tile at hand without waiting for the table: so its loads can run ahead.
    """
    if PAGE % BLOCK_N == 0:
        return page_of(page_table, row, first // PAGE, table_width, pages, first < end)
    else:
        offs_n = first + tl.arange(0, BLOCK_N)
        return page_of(page_table, row, offs_n // PAGE, table_width, pages, offs_n < end)
