// Sampling for one instruction set: compiled with -DISA=v3 and -DISA=v4.
#include "sampling.h"

#include "sampling_weights.h"

#define NAME_OF(isa) sample_rows_##isa
#define NAME(isa) NAME_OF(isa)

namespace ISA {
namespace {

// The next number of the row's own sequence (splitmix64), in [0, 1).
double draw(SamplingRow& row) {
    uint64_t z = row.key + ++row.draws * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// What the mask leaves of the logits, the others -infinity.
void apply(const uint32_t* mask, float* y, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const uint32_t bits = mask[i / 32];
        if (bits == ~0u) continue;
        for (int64_t bit = 0; bit < 32; ++bit) y[i + bit] = bits >> bit & 1 ? y[i + bit] : -INFINITY;
    }
    for (; i < n; ++i) y[i] = mask[i / 32] >> (i % 32) & 1 ? y[i] : -INFINITY;
}

// A copy with penalties, biases, bans and the mask, where the row has any.
const float* adjusted(const SamplingRow& row, const float* x, int64_t n, Room& room) {
    const int64_t seen = row.seen_count, banned = row.made < row.min_tokens ? row.banned_count : 0;
    if (!seen && !banned && !row.mask && !row.biased_count) return x;
    room.logits.resize(n);
    room.values.resize(seen);
    float *y = room.logits.data(), *values = room.values.data();
    std::memcpy(y, x, n * sizeof *x);
    for (int64_t i = 0; i < seen; ++i) values[i] = x[row.seen[i]];
    for (int64_t i = 0; i < seen; ++i) {
        const float less = values[i] / row.repetition, more = values[i] * row.repetition;
        const float value = values[i] > 0 ? less : more;
        values[i] = (value - (row.counts[i] > 0 ? row.presence : 0.0f)) - row.frequency * row.counts[i];
    }
    for (int64_t i = 0; i < seen; ++i) y[row.seen[i]] = values[i];
    for (int64_t i = 0; i < row.biased_count; ++i) y[row.biased[i]] += row.biases[i];
    for (int64_t i = 0; i < banned; ++i) y[row.banned[i]] = -INFINITY;
    if (row.mask) apply(row.mask, y, n);
    return y;
}

int64_t pick(SamplingRow& row, const float* x, int64_t n, float best, Room& room) {
    if (row.steepness == 0 || row.top_k == 1) return place_of(best, x, n) % n;  // 0 where all is banned
    const bool top_k = row.top_k > 0 && row.top_k < n, some = top_k || row.min_p > 0;
    if (top_k) {
        largest(x, n, row.top_k, room);
    } else if (some) {  // none below this logit has min_p, whatever rounding does
        find_reaching(x, n, static_cast<float>(best + (std::log2(row.min_p) - 0.01) / row.steepness), room);
        gather(x, room);
    }
    const float* kept = some ? room.values.data() : x;
    const Weights weights = weigh(kept, some ? room.values.size() : n, best, row.steepness, room);
    const bool whole = top_k || !some || row.top_p == 1;  // then the weights are all that top_p is a share of
    const uint64_t total = whole ? weights.total() : total_weight(x, n, best, row.steepness);
    const double wanted = row.top_p * static_cast<double>(total);
    if (row.min_p > 0) weights.cut(static_cast<uint32_t>(std::ceil(row.min_p * HEAVIEST)));
    int64_t picked = weights.at(draw(row));
    if (row.top_p < 1) {
        // A token counts when the likelier ones hold less than top_p. If they do not, no token from it on can count,
        // and the next draw is among the likelier ones: that leaves the chances within top-p as they are.
        while (static_cast<double>(weights.likelier(picked)) >= wanted && wanted > 0) {
            weights.keep_likelier(picked);
            picked = weights.at(draw(row));
        }
    }
    if (!some) return picked;
    return room.found ? room.ids[picked] : 0;  // none where all is banned
}

// Count the token as seen.
void record(SamplingRow& row, int32_t token) {
    ++row.made;
    if (row.seen == nullptr) return;
    const int64_t index = place_of<int32_t>(token, row.seen, row.seen_count);
    if (index == row.seen_room) return;  // the answer is longer than it was to be
    if (index == row.seen_count) row.seen[row.seen_count++] = token;
    row.counts[index] += 1;
}

// Natural log-probabilities of the model itself: of the likeliest tokens, best first; gives what to subtract from a
// logit for any other.
double measure(const SamplingBatch& batch, int64_t index, const float* x, float best, Room& room) {
    const int64_t n = batch.vocab, count = std::min<int64_t>(batch.rows[index]->logprobs, n);
    const double total = log_sum(x, n, best);
    if (count == 0) return total;
    find_reaching(x, n, lower_bound_of(count, room), room);
    const int64_t found = std::min(count, room.found);  // fewer where some logits are -infinity
    std::partial_sort(room.ids.begin(), room.ids.begin() + found, room.ids.begin() + room.found,
        [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
    for (int64_t i = 0; i < found; ++i) {
        batch.tops[index * batch.most + i] = {room.ids[i], x[room.ids[i]] - total};
    }
    return total;
}

// Have a row's history near when its turn comes.
void fetch(const SamplingRow& row) {
    for (int64_t i = 0; i < row.seen_count; i += LANES) {
        __builtin_prefetch(row.seen + i);
        __builtin_prefetch(row.counts + i);
    }
}

void sample_rows(const SamplingBatch& batch, int64_t from, int64_t last) {
    static thread_local Room room;
    const int64_t n = batch.vocab;
    for (int64_t index = from; index < last; ++index) {
        SamplingRow& row = *batch.rows[index];
        const float* x = batch.logits + index * n;
        const float best = maximum(x, n, room.maxima);
        if (index + 1 < batch.count) fetch(*batch.rows[index + 1]);
        if (!(best > LOWEST && best < INFINITY)) {  // NaN, infinity, or not one number
            batch.tokens[index] = NOT_FINITE;
            continue;
        }
        const bool measures = row.logprobs >= 0;
        const double total = measures ? measure(batch, index, x, best, room) : 0;  // first: x is near by now
        const float* y = adjusted(row, x, n, room);
        const float left = x == y ? best : maximum(y, n, room.maxima);
        if (row.mask && !(left > LOWEST)) {
            batch.tokens[index] = NOT_FINITE;
            continue;
        }
        const int64_t token = pick(row, y, n, left, room);
        batch.tokens[index] = token;
        if (measures) batch.logprobs[index] = x[token] - total;
        record(row, static_cast<int32_t>(token));
    }
}

}  // namespace
}  // namespace ISA

extern const SampleRows NAME(ISA);
const SampleRows NAME(ISA) = ISA::sample_rows;
