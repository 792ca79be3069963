// Sampling for one instruction set: compiled with -DISA=v1 (any x86-64), v3 and v4.
//
// Weights are multiples of 2^-35 that are at most 1, so that their sums in double are exact in any order, up to 2^18 of
// them: what is picked depends neither on the batch nor on the width of the vectors. There is no fused multiply-add,
// which numpy does not have.
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
typedef float v8 __attribute__((vector_size(32)));
typedef double d8 __attribute__((vector_size(64)));
typedef v16 v16_unaligned __attribute__((aligned(4)));

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;  // weights with a sum of their own
constexpr float LOWEST = -3.402823466e38f;

INLINE v16 all(float x) { return v16{} + x; }
INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_unaligned*>(p); }
INLINE v16 larger(v16 a, v16 b) { return a > b ? a : b; }
INLINE double sum(d8 x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }
INLINE d8 halves(v16 x) {
    return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), d8) +
           __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), d8);
}
INLINE bool any(i16 x) {
    int64_t words[8], together = 0;
    std::memcpy(words, &x, sizeof words);
    for (int64_t word : words) together |= word;
    return together != 0;
}

INLINE int64_t whole_blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// 2^y for y <= 0, rounded to a multiple of 2^-35: 2^n from the bits of a sum, times a polynomial of the rest.
INLINE v16 weight(v16 y) {
    constexpr float shift = 12582912.0f, coarse = 3.662109375e-4f;  // 1.5 * 2^23, 1.5 * 2^-12
    y = larger(y, all(-80.0f));
    const v16 shifted = y + shift;
    const v16 r = y - (shifted - shift);
    v16 p = all(1.326472614891827e-3f);  // off by at most 1e-7 of the value
    for (float c : {9.671512991189957e-3f, 5.550733581185341e-2f, 0.24022242426872253f, 0.6931470036506653f, 1.0f})
        p = p * r + c;
    const i16 bits = reinterpret_cast<i16>(p) + (reinterpret_cast<i16>(shifted) << 23);
    const v16 w = reinterpret_cast<v16>(bits);
    const v16 rounded = (w + coarse) - coarse;
    return w < all(2.44140625e-4f) ? rounded : w;  // from 2^-12 on it is a multiple anyway
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
    std::vector<float> logits, weights, values;
    std::vector<double> sums;
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
    float* w;
    double* sums;
    int64_t n;

    double total() const {
        double result = 0;
        for (int64_t block = 0; block < n / BLOCK; ++block) result += sums[block];
        return result;
    }
    // Zero what is below `least`.
    void cut(float least) const {
        for (int64_t i = 0; i < n; i += BLOCK) {
            d8 sum_of_block = {};
            for (int64_t j = i; j < i + BLOCK; j += LANES) {
                const v16 x = load(w + j), kept = x >= all(least) ? x : v16{};
                *reinterpret_cast<v16_unaligned*>(w + j) = kept;
                sum_of_block += halves(kept);
            }
            sums[i / BLOCK] = sum(sum_of_block);
        }
    }
    // Zero the picked one and all that come after it: those of less weight, and of the same weight and a later id.
    void keep_likelier(int64_t picked) const {
        const float edge = w[picked];
        for (int64_t i = picked; i < n; ++i) w[i] = w[i] == edge ? 0.0f : w[i];
        cut(edge);
    }
    // The first whose running sum is above draw * total.
    int64_t at(double draw) const {
        const double all_of_it = total(), wanted = std::min(draw * all_of_it, std::nextafter(all_of_it, 0.0));
        double running = 0;
        int64_t block = 0;
        for (; block + 1 < n / BLOCK && running + sums[block] <= wanted; ++block) running += sums[block];
        for (int64_t i = block * BLOCK; i < n; ++i) {
            running += w[i];
            if (running > wanted) return i;
        }
        return 0;
    }
};

// 2^(steepness * (x - best)) of x[n].
Weights weigh(const float* x, int64_t n, float best, float steepness, Room& room) {
    const int64_t padded = whole_blocks(n);
    room.weights.resize(padded);
    room.sums.resize(padded / BLOCK);
    float* w = room.weights.data();
    for (int64_t i = 0; i < padded; i += BLOCK) {
        alignas(64) float tail[BLOCK];
        const float* from = x + i;
        if (i + BLOCK > n) {
            std::fill_n(tail, BLOCK, -INFINITY);
            std::copy(x + i, x + n, tail);
            from = tail;
        }
        d8 sum_of_block = {};
        for (int64_t j = 0; j < BLOCK; j += LANES) {
            const v16 y = weight((load(from + j) - best) * steepness);
            *reinterpret_cast<v16_unaligned*>(w + i + j) = y;
            sum_of_block += halves(y);
        }
        room.sums[i / BLOCK] = sum(sum_of_block);
    }
    return {w, room.sums.data(), padded};
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
    if (!row.seen_count && !row.banned_count) return x;
    room.logits.assign(x, x + n);
    float* y = room.logits.data();
    for (int64_t i = 0; i < row.seen_count; ++i) {
        const int32_t id = row.seen[i];
        const float seen = x[id] > 0 ? x[id] / row.repetition : x[id] * row.repetition;
        y[id] = (seen - (row.counts[i] > 0 ? row.presence : 0.0f)) - row.frequency * row.counts[i];
    }
    for (int64_t i = 0; i < row.banned_count; ++i) y[row.banned[i]] = -INFINITY;
    return y;
}

int64_t pick(SamplingRow& row, const float* x, int64_t n, Room& room) {
    const float best = maximum(x, n);
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
    const double wanted = row.top_p * weights.total();
    if (row.min_p > 0) {
        float least = static_cast<float>(row.min_p);
        if (least < row.min_p) least = std::nextafter(least, 2.0f);
        weights.cut(least);
    }
    int64_t picked = weights.at(draw(row));
    if (row.top_p < 1) {
        // A token counts when the likelier ones hold less than top_p. If they do not, no token from it on can count,
        // and the next draw is among the likelier ones: that leaves the chances within top-p as they are.
        for (weights.keep_likelier(picked); weights.total() >= wanted; weights.keep_likelier(picked)) {
            picked = weights.at(draw(row));
        }
    }
    if (!some) return picked;
    return room.ids.empty() ? 0 : room.ids[picked];  // empty where no logit is a number
}

// Natural log-probabilities of the model itself: of the picked token, and of the likeliest ones, best first.
void measure(const SamplingBatch& batch, int64_t index, int64_t count, const float* x, Room& room) {
    const int64_t n = batch.vocab;
    const float best = maximum(x, n);
    const double total = best + std::log(weigh(x, n, best, 1.44269504f, room).total());
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
    for (int64_t index = from; index < last; ++index) {
        SamplingRow& row = *batch.rows[index];
        const float* x = batch.logits + index * batch.vocab;
        batch.tokens[index] = pick(row, adjusted(row, x, batch.vocab, room), batch.vocab, room);
        if (row.logprobs >= 0) measure(batch, index, row.logprobs, x, room);
    }
}

}  // namespace
}  // namespace ISA

extern const SampleRows NAME(ISA);
const SampleRows NAME(ISA) = ISA::sample_rows;
