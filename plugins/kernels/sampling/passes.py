"""Passes over one row of logits by one program: what sample_pick is made of.

A row is too long for registers, so every pass reads it anew, from the L2 cache. What it keeps of the row is a rule of a
few numbers (an edge of logits, an edge of weights), never a list: nothing is written for a later pass to read.
"""

# Triton gives kernels' arguments their types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power(y):
    """2^(30 + y) for y <= 0: 2^n from the bits of a sum, times a polynomial of the rest; below -80 as at -80."""
    y = tl.maximum(y, -80.0)
    shifted = y + 12582912.0  # 1.5 * 2^23: what is added to it is rounded to a whole number
    rest = y - (shifted - 12582912.0)
    value = tl.zeros_like(y) + 1.326472614891827e-3 * 1073741824.0
    value = tl.fma(value, rest, tl.zeros_like(y) + 9.671512991189957e-3 * 1073741824.0)
    value = tl.fma(value, rest, tl.zeros_like(y) + 5.550733581185341e-2 * 1073741824.0)
    value = tl.fma(value, rest, tl.zeros_like(y) + 0.24022242426872253 * 1073741824.0)
    value = tl.fma(value, rest, tl.zeros_like(y) + 0.6931470036506653 * 1073741824.0)
    value = tl.fma(value, rest, tl.zeros_like(y) + 1073741824.0)
    bits = value.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_of(x):
    """Integers in the order of the floats; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def values_at(x, ids, VOCAB: tl.constexpr):
    """The row's logits at ids, -infinity behind its end."""
    return tl.load(x + ids, mask=ids < VOCAB, other=-float("inf"))


@triton.jit
def largest(x, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, the lowest id that has it, a logit that BLOCK of the row reach, and whether one is NaN."""
    offs = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = offs
    strange = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        value = values_at(x, start + offs, VOCAB)
        strange = tl.where(value != value, 1, strange)
        at = tl.where(value > most, start + offs, at)
        most = tl.where(value > most, value, most)
    best = tl.max(most, 0)
    return best, tl.min(tl.where(most == best, at, VOCAB), 0), tl.min(most, 0), tl.max(strange, 0)


@triton.jit
def reaching(x, first, second, third, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits have at least each of three keys, which are above -infinity's: so nothing is behind the end."""
    offs = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    more = counts
    most = counts
    for start in range(0, VOCAB, BLOCK):
        key = key_of(values_at(x, start + offs, VOCAB))
        counts += (key >= first.to(tl.int32)).to(tl.int32)
        more += (key >= second.to(tl.int32)).to(tl.int32)
        most += (key >= third.to(tl.int32)).to(tl.int32)
    return tl.sum(counts, 0), tl.sum(more, 0), tl.sum(most, 0)


@triton.jit
def edge_of(x, count, least, best, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Where the `count` largest logits end, 0 < count < VOCAB: those of a larger key than the first number given, and
    those of this key up to the id that is the second. `count` logits reach `least`.
    """
    low = key_of(least).to(tl.int64)
    high = key_of(best).to(tl.int64)
    reached = tl.full((), VOCAB, tl.int32)  # by low, once it is known
    while low < high:  # low is reached by count, what is above high is not; each turn leaves a quarter
        first = low + tl.maximum((high - low) // 4, 1)
        second = low + tl.maximum((high - low) // 2, 1)
        third = low + tl.maximum(3 * (high - low) // 4, 1)
        many, some, few = reaching(x, first, second, third, VOCAB, BLOCK)
        above = tl.where(few >= count, high, third - 1)
        above = tl.where(some >= count, above, second - 1)
        above = tl.where(many >= count, above, first - 1)
        low = tl.where(many >= count, tl.where(some >= count, tl.where(few >= count, third, second), first), low)
        reached = tl.where(many >= count, tl.where(some >= count, tl.where(few >= count, few, some), many), reached)
        high = tl.where(reached == count, low, above)
    last = tl.full((), VOCAB, tl.int32)
    if reached != count:  # several logits are the last one: the lowest ids stay
        over, over, over = reaching(x, low + 1, low + 1, low + 1, VOCAB, BLOCK)
        left = count - over
        offs = tl.arange(0, BLOCK)
        running = tl.full((), 0, tl.int32)
        for start in range(0, VOCAB, BLOCK):
            ids = start + offs
            equal = ((key_of(values_at(x, ids, VOCAB)) == low.to(tl.int32)) & (ids < VOCAB)).to(tl.int32)
            place = running + tl.cumsum(equal, 0)
            last = tl.minimum(last, tl.min(tl.where((equal == 1) & (place == left), ids, VOCAB), 0))
            running += tl.sum(equal, 0)
    return low.to(tl.int32), last


@triton.jit
def weights_at(x, ids, best, steepness, edge, last, VOCAB: tl.constexpr):
    """The weights at ids, int32, of those within the edge of edge_of; others weigh nothing."""
    value = values_at(x, ids, VOCAB)
    key = key_of(value)
    weight = power((value - best) * steepness).to(tl.int32)  # rounded down
    return tl.where((key > edge) | ((key == edge) & (ids <= last)), weight, 0)


@triton.jit
def likelier_of(weight, ids, least, over, before):
    """Weights of at least `least` before token `before`, whose weight is `over`: heavier, or of a lower id."""
    kept = (weight >= least) & ((weight > over) | ((weight == over) & (ids < before)))
    return tl.where(kept, weight, 0).to(tl.int64)


@triton.jit
def total_of(x, best, steepness, edge, last, least, over, before, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the weights that likelier_of keeps, int64: exact in any order."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, VOCAB, BLOCK):
        ids = start + offs
        weight = weights_at(x, ids, best, steepness, edge, last, VOCAB)
        total += likelier_of(weight, ids, least, over, before)
    return tl.sum(total, 0)


@triton.jit
def place_of(x, target, best, steepness, edge, last, least, over, before, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The first id whose running sum of the weights that likelier_of keeps is above `target`, and its weight; id 0
    where target is negative.
    """
    offs = tl.arange(0, BLOCK)
    running = tl.full((), 0, tl.int64)
    skipped = running
    first = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + offs
        weight = weights_at(x, ids, best, steepness, edge, last, VOCAB)
        following = running + tl.sum(likelier_of(weight, ids, least, over, before), 0)
        here = (running <= target) & (target < following)
        first = tl.where(here, start, first)
        skipped = tl.where(here, running, skipped)
        running = following
    weight = weights_at(x, first + offs, best, steepness, edge, last, VOCAB)
    sums = skipped + tl.cumsum(likelier_of(weight, first + offs, least, over, before), 0)
    place = tl.sum((sums <= target).to(tl.int32), 0)
    return first + place, tl.sum(tl.where(offs == place, weight, 0), 0)


@triton.jit
def number_of(key, draw):
    """Number `draw` of the row's own sequence (splitmix64), in [0, 1)."""
    z = key + draw.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def target_of(number, total):
    """The number's share of a total, below it; -1 of nothing."""
    return tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def power_sum(x, best, VOCAB: tl.constexpr, ROWS: tl.constexpr):
    """The sum of 2^30 * e^(x - best): eight at a time in float32, as the CPU samplers take them, those in float64."""
    rows = tl.arange(0, ROWS)[:, None] * 256
    lanes = tl.arange(0, 32)[None, :]
    total = tl.zeros((ROWS, 32), tl.float64)
    for start in range(0, VOCAB, ROWS * 256):
        part = tl.zeros((ROWS, 32), tl.float32)
        for eighth in tl.static_range(8):
            value = values_at(x, start + rows + eighth * 32 + lanes, VOCAB)
            part += power((value - best) * 1.44269504)
        total += tl.where(start + rows < VOCAB, part, 0.0).to(tl.float64)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def following(x, logit, token, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The likeliest token after this one, and its logit: of equal ones the lowest id comes first."""
    offs = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.full((BLOCK,), VOCAB, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + offs
        value = values_at(x, ids, VOCAB)
        later = ((value < logit) | ((value == logit) & (ids > token))) & (ids < VOCAB)
        better = later & ((value > most) | (at == VOCAB))
        at = tl.where(better, ids, at)
        most = tl.where(better, value, most)
    best = tl.max(most, 0)
    return tl.min(tl.where(most == best, at, VOCAB), 0), best
