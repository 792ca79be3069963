"""sample_pick: the next token of every row, and what its log-probabilities are made of.

Launch, after sample_adjust where a row has changes:

    sample_pick  grid (rows, 1, 1)
        logits *fp32 [places, VOCAB], adjusted *fp32 [rows, VOCAB], places *i32 [rows], starts *i32 [rows + 1],
        keys *i64 [rows], draws *i64 [rows], steepness *fp32 [rows], top_ps *fp64 [rows], top_ks *i32 [rows],
        leasts *i32 [rows], wanted *i32 [rows],
        tokens *i32 [rows], used *i64 [rows], totals *fp64 [rows], bests *fp32 [rows], owns *fp32 [rows],
        top_ids *i32 [rows, MOST], top_logits *fp32 [rows, MOST]

Row r reads logits[places[r]], and picks from adjusted[r] where starts say that it has changes. steepness is
log2(e) / temperature, 0 for greedy; top_ks 0 keep all; leasts are the smallest weights that min-p keeps, of 2^30;
wanted says of how many likeliest tokens logits are given, at most MOST, -1 for no log-probabilities at all. `used`
are draws with those that the row took. The token of a row that holds NaN or infinity, or no number above float32's
least, is -1. A log-probability is a logit less bests + ln(totals / 2^30).

Tokens and draws are those of the CPU samplers (sampling_numpy.py, csrc/sampling), for equal logits, whatever the batch
and the tile: weights are whole numbers, made by the same float32 operations, and their sums in 64 bits are exact in any
order; products that decide (a draw's share, top-p's) are one float64 operation on the same numbers; of equal logits the
lowest id comes first. numpy rounds a fused multiply-add through float64, which differs from the processors' own, C++
and GPU alike, once in about 2^29 operations, by 2^-24 of a weight.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_trt.plugins.kernels.sampling.passes import (
    edge_of,
    following,
    largest,
    number_of,
    place_of,
    power_sum,
    target_of,
    total_of,
)


@triton.jit
def sample_pick(
    logits,
    adjusted,
    places,
    starts,
    keys,
    draws,
    steepness,
    top_ps,
    top_ks,
    leasts,
    wanted,
    tokens,
    used,
    totals,
    bests,
    owns,
    top_ids,
    top_logits,
    VOCAB: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One row; BLOCK logits at a time, or ROWS times 256 where their powers are summed."""
    row = tl.program_id(0)
    x = logits + tl.load(places + row).to(tl.int64) * VOCAB
    best, token, reached, strange = largest(x, VOCAB, BLOCK)
    draw = tl.load(draws + row)
    if (strange == 0) & (best > -3.4028234663852886e38) & (best < float("inf")):
        count = tl.load(wanted + row)
        if count >= 0:
            tl.store(totals + row, power_sum(x, best, VOCAB, ROWS))
            tl.store(bests + row, best)
            logit = tl.full((), float("inf"), tl.float32)
            likely = tl.full((), -1, tl.int32)
            for place in range(0, count):
                likely, logit = following(x, logit, likely, VOCAB, BLOCK)
                tl.store(top_ids + row.to(tl.int64) * MOST + place, likely)
                tl.store(top_logits + row.to(tl.int64) * MOST + place, logit)
        y = x
        if tl.load(starts + row + 1) > tl.load(starts + row):
            y = adjusted + row.to(tl.int64) * VOCAB
            best, token, reached, strange = largest(y, VOCAB, BLOCK)
        steep = tl.load(steepness + row)
        top_k = tl.load(top_ks + row)
        if (steep != 0.0) & (top_k != 1):
            edge = tl.full((), -2147483648, tl.int32)
            last = tl.full((), VOCAB, tl.int32)
            if (top_k > 0) & (top_k < VOCAB):
                reached = tl.where(top_k <= BLOCK, reached, -float("inf"))
                edge, last = edge_of(y, top_k, reached, best, VOCAB, BLOCK)
            most = tl.maximum(best, -3.4028234663852886e38)
            least = tl.load(leasts + row)
            top_p = tl.load(top_ps + row)
            key = tl.load(keys + row).to(tl.uint64, bitcast=True)
            over = tl.full((), 0, tl.int32)
            before = tl.full((), 0, tl.int32)
            total = total_of(y, most, steep, edge, last, 0, over, before, VOCAB, BLOCK)
            share = top_p * total.to(tl.float64)
            if least > 0:
                total = total_of(y, most, steep, edge, last, least, over, before, VOCAB, BLOCK)
            draw += 1
            target = target_of(number_of(key, draw), total)
            token, weight = place_of(y, target, most, steep, edge, last, least, over, before, VOCAB, BLOCK)
            if top_p < 1.0:
                # A token counts when the likelier ones hold less than top_p. If they do not, no token from it on can
                # count, and the next draw is among the likelier ones: the chances within top-p stay as they are.
                total = total_of(y, most, steep, edge, last, least, weight, token, VOCAB, BLOCK)
                while (total.to(tl.float64) >= share) & (share > 0.0):
                    over = weight
                    before = token
                    draw += 1
                    target = target_of(number_of(key, draw), total)
                    token, weight = place_of(y, target, most, steep, edge, last, least, over, before, VOCAB, BLOCK)
                    total = total_of(y, most, steep, edge, last, least, weight, token, VOCAB, BLOCK)
        tl.store(owns + row, tl.load(x + token))
    else:
        token = tl.full((), -1, tl.int32)
    tl.store(tokens + row, token)
    tl.store(used + row, draw)
