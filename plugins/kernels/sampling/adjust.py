"""sample_adjust: penalties, biases and bans, written over a copy of the logits.

Launch, once the changed rows' logits were copied to their places in `adjusted` on the same stream:

    sample_adjust  grid (rows, cdiv(most changes of a row, BLOCK), 1)
        logits *fp32 [places, VOCAB], adjusted *fp32 [rows, VOCAB], places *i32 [rows], starts *i32 [rows + 1],
        ids *i32 [changes], counts *fp32 [changes], drops *fp32 [changes], biases *fp32 [changes],
        repetitions *fp32 [rows], presences *fp32 [rows]

Row r's changes are starts[r] to starts[r + 1], each of another token: counts say how often it came up in the answer,
-1 for a token that has no penalties; drops are the frequency penalty times counts; biases are added afterwards,
-infinity for one that is banned. Each product and difference is rounded by itself, as the CPU samplers do: drops are
products made on the host, as a compiler would make one operation of a product and the difference that it goes into.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sample_adjust(
    logits,
    adjusted,
    places,
    starts,
    ids,
    counts,
    drops,
    biases,
    repetitions,
    presences,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK changes of one row."""
    row = tl.program_id(0)
    at = tl.load(starts + row) + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(starts + row + 1)
    token = tl.load(ids + at, mask=mask, other=0)
    count = tl.load(counts + at, mask=mask, other=-1.0)
    bias = tl.load(biases + at, mask=mask, other=0.0)
    place = tl.load(places + row).to(tl.int64)
    value = tl.load(logits + place * VOCAB + token, mask=mask, other=0.0)
    repetition = tl.load(repetitions + row)
    less = tl.div_rn(value, tl.zeros_like(value) + repetition)
    repeated = tl.where(value > 0.0, less, value * repetition)
    present = repeated - tl.where(count > 0.0, tl.load(presences + row), 0.0)
    penalised = present - tl.load(drops + at, mask=mask, other=0.0)
    value = tl.where(count >= 0.0, penalised, value) + bias
    tl.store(adjusted + row.to(tl.int64) * VOCAB + token, value, mask=mask)
