"""The paged latent cache, as both MLA ops write and read it: in torch, and as ONNX statements.

The pool is [P, page, D]. Token t of sequence b lies in page page_table[b, t // page], slot t % page. Page 0 is scratch:
padding is written there and nobody reads it. Entries of page_table beyond a sequence's last page are not used, but must
name some page of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_latents(
    pool: Tensor, latent: Tensor, page_table: Tensor, past_lengths: Tensor, sequence_lengths: Tensor
) -> Tensor:
    """A copy of `pool` in which `latent` [B, S, D] lies at each row's positions past_lengths.. ; padding in page 0."""
    page = pool.shape[1]
    steps = torch.arange(latent.shape[1], device=latent.device)  # [S]
    positions = past_lengths.long()[:, None] + steps  # [B, S]
    logical = (positions // page).clamp(max=page_table.shape[1] - 1)
    physical = page_table.long().gather(1, logical)
    physical = torch.where(steps < sequence_lengths.long()[:, None], physical, 0)
    return pool.index_put((physical, positions % page), latent)


def read_latents(pool: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    """The cached latents [B, M * page, D] of each row, zero where t >= lengths[b] (what lies there may be NaN)."""
    gathered = pool[page_table.long()].flatten(1, 2)  # [B, T, D]
    live = torch.arange(gathered.shape[1], device=pool.device) < lengths.long()[:, None]  # [B, T]
    return torch.where(live[:, :, None], gathered, 0)


CONSTANTS_BODY = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    last_axis = Constant <value_ints = [-1]> ()
    lowest = Constant <value_float = -3.0e38> ()
"""

# From past_latent, latent, page_table, past_lengths, new [B] to slots; also table, past, positions.
PLACES_BODY = """
    table = Cast <to = 7> (page_table)
    past = Cast <to = 7> (past_lengths)
    past_column = Unsqueeze (past, axis_1)
    page_dim = Shape <start = 1, end = 2> (past_latent)
    sequence_dim = Shape <start = 1, end = 2> (latent)
    sequence = Squeeze (sequence_dim)
    steps = Range (zero, sequence, one)
    positions = Add (past_column, steps)
    table_width = Shape <start = 1> (table)
    last_entry = Sub (table_width, one)
    page_wanted = Div (positions, page_dim)
    page_listed = Min (page_wanted, last_entry)
    page_found = GatherElements <axis = 1> (table, page_listed)
    new_column = Unsqueeze (new, axis_1)
    is_real = Less (steps, new_column)
    page_real = Where (is_real, page_found, zero)
    offset = Mod (positions, page_dim)
    page_index = Unsqueeze (page_real, last_axis)
    offset_index = Unsqueeze (offset, last_axis)
    slots = Concat <axis = -1> (page_index, offset_index)
"""

# The same and present_latent.
WRITE_BODY = f"""{PLACES_BODY}
    present_latent = ScatterND (past_latent, slots, latent)
"""

# From rows [B, T, D], past and new [B] to latents, which are zero where nothing is cached, and is_cached [B, T].
LIVE_BODY = """
    rows_dim = Shape <start = 1, end = 2> (rows)
    capacity = Squeeze (rows_dim)
    times = Range (zero, capacity, one)
    total = Add (past, new)
    total_column = Unsqueeze (total, axis_1)
    is_cached = Less (times, total_column)
    is_cached_row = Unsqueeze (is_cached, last_axis)
    empty = CastLike (zero, rows)
    latents = Where (is_cached_row, rows, empty)
"""

# The same from present_latent and table.
READ_BODY = f"""
    pages = Gather <axis = 0> (present_latent, table)
    latent_dim = Shape <start = 2> (past_latent)
    keep_batch = Constant <value_ints = [0, -1]> ()
    rows_shape = Concat <axis = 0> (keep_batch, latent_dim)
    rows = Reshape (pages, rows_shape)
    {LIVE_BODY}
"""
