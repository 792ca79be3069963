// Sampling for one instruction set: compiled with -DISA=v3 and -DISA=v4.
//
// Weights are integers, so that their sums are exact in any order: what is picked depends neither on the batch nor on
// the width of the vectors.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#define NAME_OF(isa) sample_rows_##isa
#define NAME(isa) NAME_OF(isa)
#define INLINE inline __attribute__((always_inline))

namespace ISA {
namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint64_t w8 __attribute__((vector_size(64)));
typedef v16 v16_unaligned __attribute__((aligned(4)));
typedef u16 u16_unaligned __attribute__((aligned(4)));

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;  // weights with a sum of their own
constexpr double HEAVIEST = 1 << 30;
constexpr float LOWEST = -3.402823466e38f;

INLINE v16 all(float x) { return v16{} + x; }
INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_unaligned*>(p); }
INLINE u16 load(const uint32_t* p) { return *reinterpret_cast<const u16_unaligned*>(p); }
INLINE void store(uint32_t* p, u16 x) { *reinterpret_cast<u16_unaligned*>(p) = x; }
INLINE v16 larger(v16 a, v16 b) { return a > b ? a : b; }
INLINE w8 halves(u16 x) {
    const u8 low = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    const u8 high = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_convertvector(low, w8) + __builtin_convertvector(high, w8);
}
// Of a block's four vectors: two weights fit into 32 bits, more need not.
INLINE uint64_t sum(u16 a, u16 b, u16 c, u16 d) {
    const w8 x = halves(a + b) + halves(c + d);
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
INLINE bool any(i16 x) {
    int64_t words[8], together = 0;
    std::memcpy(words, &x, sizeof words);
    for (int64_t word : words) together |= word;
    return together != 0;
}

INLINE int64_t whole_blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// 2^(30 + y) for y <= 0, rounded down: 2^n from the bits of a sum, times a polynomial of the rest, off by at most 1e-7
// of the value.
INLINE u16 weight(v16 y) {
    constexpr float shift = 12582912.0f, scale = 1 << 30;  // 1.5 * 2^23
    y = larger(y, all(-80.0f));
    const v16 shifted = y + shift;
    const v16 r = y - (shifted - shift);
    v16 p = all(1.326472614891827e-3f * scale);
    for (float c : {9.671512991189957e-3f, 5.550733581185341e-2f, 0.24022242426872253f, 0.6931470036506653f, 1.0f})
        p = __builtin_elementwise_fma(p, r, all(c * scale));
    const i16 bits = reinterpret_cast<i16>(p) + (reinterpret_cast<i16>(shifted) << 23);
    return reinterpret_cast<u16>(__builtin_convertvector(reinterpret_cast<v16>(bits), i16));
}

float maximum(const float* x, int64_t n) {
    v16 best = all(LOWEST), other = best;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        best = larger(load(x + i), best);
        other = larger(load(x + i + LANES), other);
    }
    best = larger(best, other);
    float result = best[0];
    for (int lane = 1; lane < LANES; ++lane) result = std::max(result, best[lane]);
    for (; i < n; ++i) result = std::max(result, x[i]);
    return result;
}

int64_t first_equal(const float* x, int64_t n, float value) {
    int64_t i = 0;
    for (; i + LANES <= n && !any(load(x + i) == all(value)); i += LANES) {}
    while (i < n && x[i] != value) ++i;
    return i < n ? i : 0;
}

// The rooms that one thread works in.
struct Room {
    std::vector<float> logits, values;
    std::vector<uint32_t> weights;
    std::vector<uint64_t> sums;
    std::vector<int32_t> ids;
};

// The ids of the `count` largest of x in order of id; of equal ones the lowest ids.
void largest(const float* x, int64_t n, int64_t count, Room& room) {
    std::vector<float>& values = room.values;
    std::vector<int32_t>& ids = room.ids;
    values.clear();
    ids.clear();
    // The count-th largest of maxima of groups is not above the count-th largest of all.
    const int64_t rows = std::min<int64_t>(n / LANES, std::max<int64_t>(1, n / (4 * count)));
    int64_t groups = 0;
    if (rows > 1) {
        values.resize(n / LANES / rows * LANES);
        for (int64_t i = 0; i + rows * LANES <= n; i += rows * LANES) {
            v16 best = load(x + i);
            for (int64_t row = 1; row < rows; ++row) best = larger(load(x + i + row * LANES), best);
            *reinterpret_cast<v16_unaligned*>(&values[groups]) = best;
            groups += LANES;
        }
    }
    float least = -INFINITY;
    if (groups >= count) {
        std::nth_element(values.begin(), values.begin() + (count - 1), values.end(), std::greater<float>());
        least = values[count - 1];
    }
    values.clear();
    int64_t i = 0;
    const auto take = [&](int64_t from, int64_t last) {
        for (int64_t j = from; j < last; ++j) {
            if (x[j] >= least) ids.push_back(static_cast<int32_t>(j)), values.push_back(x[j]);
        }
    };
    for (; i + LANES <= n; i += LANES) {
        if (any(load(x + i) >= all(least))) take(i, i + LANES);
    }
    take(i, n);
    if (static_cast<int64_t>(ids.size()) <= count) return;
    std::nth_element(values.begin(), values.begin() + (count - 1), values.end(), std::greater<float>());
    const float edge = values[count - 1];
    int64_t above = 0;
    for (int32_t id : ids) above += x[id] > edge;
    int64_t on_edge = count - above, kept = 0;
    for (int32_t id : ids) {
        if (x[id] > edge || (x[id] == edge && on_edge-- > 0)) ids[kept++] = id;
    }
    ids.resize(kept);
}

// Weights w[n], padded with zeros to whole blocks, and the sum of each block.
struct Weights {
    uint32_t* w;
    uint64_t* sums;
    int64_t n;

    uint64_t total() const {
        uint64_t result = 0;
        for (int64_t block = 0; block < n / BLOCK; ++block) result += sums[block];
        return result;
    }
    // Zero what is below `least`.
    void cut(uint32_t least) const {
        for (int64_t i = 0; i < n; i += BLOCK) {
            u16 kept[4];
            for (int part = 0; part < 4; ++part) {
                const u16 x = load(w + i + part * LANES);
                kept[part] = x >= u16{} + least ? x : u16{};
                store(w + i + part * LANES, kept[part]);
            }
            sums[i / BLOCK] = sum(kept[0], kept[1], kept[2], kept[3]);
        }
    }
    // Zero the picked one and all that come after it: those of less weight, and of the same weight and a later id.
    void keep_likelier(int64_t picked) const {
        const uint32_t edge = w[picked];
        for (int64_t i = picked; i < n; ++i) w[i] = w[i] == edge ? 0 : w[i];
        cut(edge);
    }
    // The first whose running sum is above draw * total.
    int64_t at(double draw) const {
        const uint64_t all_of_it = total();
        if (all_of_it == 0) return 0;
        const uint64_t wanted = std::min(static_cast<uint64_t>(draw * static_cast<double>(all_of_it)), all_of_it - 1);
        uint64_t running = 0;
        int64_t block = 0;
        while (running + sums[block] <= wanted) running += sums[block++];
        int64_t i = block * BLOCK;
        while ((running += w[i]) <= wanted) ++i;
        return i;
    }
};

// Calls body with the four vectors of weights 2^(steepness * (x - best)) of each block of x[n].
template <class Body>
INLINE void each_block(const float* x, int64_t n, float best, float steepness, Body body) {
    for (int64_t i = 0; i < n; i += BLOCK) {
        alignas(64) float tail[BLOCK];
        const float* from = x + i;
        if (i + BLOCK > n) {
            std::fill_n(tail, BLOCK, -INFINITY);
            std::copy(x + i, x + n, tail);
            from = tail;
        }
        u16 w[4];
        for (int part = 0; part < 4; ++part) w[part] = weight((load(from + part * LANES) - best) * steepness);
        body(i, w);
    }
}

Weights weigh(const float* x, int64_t n, float best, float steepness, Room& room) {
    const int64_t padded = whole_blocks(n);
    room.weights.resize(padded);
    room.sums.resize(padded / BLOCK);
    each_block(x, n, best, steepness, [&](int64_t i, const u16* w) {
        for (int part = 0; part < 4; ++part) store(room.weights.data() + i + part * LANES, w[part]);
        room.sums[i / BLOCK] = sum(w[0], w[1], w[2], w[3]);
    });
    return {room.weights.data(), room.sums.data(), padded};
}

// The next number of the row's own sequence (splitmix64), in [0, 1).
double draw(SamplingRow& row) {
    uint64_t z = row.key + ++row.draws * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// A copy with penalties and bans, where the row has any.
const float* adjusted(const SamplingRow& row, const float* x, int64_t n, Room& room) {
    const int32_t banned = row.made < row.min_tokens ? row.banned_count : 0;
    if (!row.seen_count && !banned) return x;
    room.logits.assign(x, x + n);
    float* y = room.logits.data();
    for (int64_t i = 0; i < row.seen_count; ++i) {
        const int32_t id = row.seen[i];
        const float seen = x[id] > 0 ? x[id] / row.repetition : x[id] * row.repetition;
        y[id] = (seen - (row.counts[i] > 0 ? row.presence : 0.0f)) - row.frequency * row.counts[i];
    }
    for (int64_t i = 0; i < banned; ++i) y[row.banned[i]] = -INFINITY;
    return y;
}

int64_t pick(SamplingRow& row, const float* x, int64_t n, float best, Room& room) {
    if (row.steepness == 0 || row.top_k == 1) return first_equal(x, n, best);
    const bool some = row.top_k > 0 && row.top_k < n;
    const float* kept = x;
    if (some) {
        largest(x, n, row.top_k, room);
        room.values.resize(room.ids.size());
        for (size_t i = 0; i < room.ids.size(); ++i) room.values[i] = x[room.ids[i]];
        kept = room.values.data();
    }
    const Weights weights = weigh(kept, some ? room.ids.size() : n, best, row.steepness, room);
    const double wanted = row.top_p * static_cast<double>(weights.total());
    if (row.min_p > 0) weights.cut(static_cast<uint32_t>(std::ceil(row.min_p * HEAVIEST)));
    int64_t picked = weights.at(draw(row));
    if (row.top_p < 1) {
        // A token counts when the likelier ones hold less than top_p. If they do not, no token from it on can count,
        // and the next draw is among the likelier ones: that leaves the chances within top-p as they are.
        weights.keep_likelier(picked);
        while (static_cast<double>(weights.total()) >= wanted && wanted > 0) {
            picked = weights.at(draw(row));
            weights.keep_likelier(picked);
        }
    }
    if (!some) return picked;
    return room.ids.empty() ? 0 : room.ids[picked];  // empty where no logit is a number
}

// Count the token as seen.
void record(SamplingRow& row, int32_t token) {
    ++row.made;
    if (row.seen == nullptr) return;
    const int32_t* place = std::find(row.seen, row.seen + row.seen_count, token);
    const int64_t index = place - row.seen;
    if (index == row.seen_room) return;  // the answer is longer than it was to be
    if (index == row.seen_count) row.seen[row.seen_count++] = token;
    row.counts[index] += 1;
}

// Natural log-probabilities of the model itself: of the picked token, and of the likeliest ones, best first.
void measure(const SamplingBatch& batch, int64_t index, int64_t count, const float* x, float best, Room& room) {
    const int64_t n = batch.vocab;
    uint64_t sum_of_all = 0;
    each_block(x, n, best, 1.44269504f, [&](int64_t, const u16* w) { sum_of_all += sum(w[0], w[1], w[2], w[3]); });
    const double total = best + std::log(static_cast<double>(sum_of_all) / HEAVIEST);
    batch.logprobs[index] = x[batch.tokens[index]] - total;
    if (count == 0) return;
    largest(x, n, std::min(count, n), room);
    std::sort(room.ids.begin(), room.ids.end(),
              [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
    for (size_t i = 0; i < room.ids.size(); ++i) {
        batch.top_ids[index * batch.most + i] = room.ids[i];
        batch.top_logprobs[index * batch.most + i] = x[room.ids[i]] - total;
    }
}

void sample_rows(const SamplingBatch& batch, int64_t from, int64_t last) {
    static thread_local Room room;
    const int64_t n = batch.vocab;
    for (int64_t index = from; index < last; ++index) {
        SamplingRow& row = *batch.rows[index];
        const float* x = batch.logits + index * n;
        const float* y = adjusted(row, x, n, room);
        const float best = maximum(y, n);
        const int64_t token = pick(row, y, n, best, room);
        batch.tokens[index] = token;
        if (row.logprobs >= 0) measure(batch, index, row.logprobs, x, x == y ? best : maximum(x, n), room);
        record(row, static_cast<int32_t>(token));
    }
}

}  // namespace
}  // namespace ISA

extern const SampleRows NAME(ISA);
const SampleRows NAME(ISA) = ISA::sample_rows;
