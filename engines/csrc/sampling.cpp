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
#define INLINE_BODY __attribute__((always_inline))  // of a lambda
#define INLINE inline INLINE_BODY

namespace ISA {
namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef bool bits16 __attribute__((ext_vector_type(16)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint64_t w8 __attribute__((vector_size(64)));
typedef v16 v16_unaligned __attribute__((aligned(4)));
typedef i16 i16_unaligned __attribute__((aligned(4)));
typedef u16 u16_unaligned __attribute__((aligned(4)));

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 256;  // weights with a sum of their own
constexpr double HEAVIEST = 1 << 30;
constexpr float LOWEST = -3.402823466e38f;

INLINE v16 all(float x) { return v16{} + x; }
INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_unaligned*>(p); }
INLINE u16 load(const uint32_t* p) { return *reinterpret_cast<const u16_unaligned*>(p); }
INLINE void store(uint32_t* p, u16 x) { *reinterpret_cast<u16_unaligned*>(p) = x; }
INLINE v16 larger(v16 a, v16 b) { return a > b ? a : b; }
// Of two vectors of weights, whose sums fit into 32 bits; those of more need not.
INLINE w8 sum_of(u16 a, u16 b) {
    const w8 both = reinterpret_cast<w8>(a + b);
    return (both & 0xffffffff) + (both >> 32);
}
INLINE uint64_t sum_of(w8 x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }
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
    std::vector<int32_t> keys, ids;
    std::vector<uint16_t> marks;
    std::vector<uint32_t> weights;
    std::vector<uint64_t> sums;
};

// Integers in the order of the floats; both zeros are one.
INLINE i16 keys_of(v16 x) {
    const i16 bits = reinterpret_cast<i16>(x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
INLINE float float_of(int32_t key) {
    key ^= (key >> 31) & 0x7fffffff;
    float x;
    std::memcpy(&x, &key, sizeof x);
    return x;
}
// A bit for each lane that is true.
INLINE uint16_t bits_of(i16 x) {
    const bits16 b = __builtin_convertvector(x, bits16);
    uint16_t bits;
    std::memcpy(&bits, &b, sizeof bits);
    return bits;
}

// The largest key that at least `count` of keys[n] reach, or any that at most `enough` reach beside. n is a multiple of
// LANES. Halving an interval costs no wrong guess of a branch, which ordering the keys does at every other one.
int32_t edge_of(const int32_t* keys, int64_t n, int64_t count, int64_t enough) {
    int64_t low = INT32_MIN, high = INT32_MAX;  // low is reached by count of them, what is above high is not
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const i16 least = i16{} + static_cast<int32_t>(middle);
        int64_t reached = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            reached += __builtin_popcount(bits_of(*reinterpret_cast<const i16_unaligned*>(keys + i) >= least));
        }
        if (reached >= count) {
            low = middle;
            if (reached <= enough) break;
        } else {
            high = middle - 1;
        }
    }
    return static_cast<int32_t>(low);
}

// A value that at least `count` of x[n] reach, and not many more: the count-th largest maximum of groups is not above
// the count-th largest of all.
float lower_bound_of(const float* x, int64_t n, int64_t count, Room& room) {
    const int64_t vectors = n / LANES, deep = vectors * LANES / (4 * count);
    if (deep < 2) return -INFINITY;
    const int64_t groups = vectors / std::min(deep, vectors);
    room.keys.resize(groups * LANES);
    for (int64_t group = 0; group < groups; ++group) {
        const float* from = x + group * std::min(deep, vectors) * LANES;
        v16 best = load(from);
        for (int64_t row = 1; row < std::min(deep, vectors); ++row) best = larger(load(from + row * LANES), best);
        *reinterpret_cast<i16_unaligned*>(&room.keys[group * LANES]) = keys_of(best);
    }
    if (groups * LANES < count) return -INFINITY;
    return float_of(edge_of(room.keys.data(), groups * LANES, count, count + count / 4));
}

// The ids of x[n] that reach `least`, in order.
void find_reaching(const float* x, int64_t n, float least, Room& room) {
    const int64_t words = n / 64;
    room.marks.resize(words * 4);
    for (int64_t i = 0; i < words * 4; ++i) room.marks[i] = bits_of(load(x + i * LANES) >= all(least));
    room.ids.clear();
    for (int64_t word = 0; word < words; ++word) {
        uint64_t marks;
        std::memcpy(&marks, &room.marks[word * 4], sizeof marks);
        for (; marks; marks &= marks - 1) room.ids.push_back(static_cast<int32_t>(word * 64 + __builtin_ctzll(marks)));
    }
    for (int64_t i = words * 64; i < n; ++i) {
        if (x[i] >= least) room.ids.push_back(static_cast<int32_t>(i));
    }
}

// The ids of the `count` largest of x in order of id; of equal ones the lowest ids.
void largest(const float* x, int64_t n, int64_t count, Room& room) {
    find_reaching(x, n, lower_bound_of(x, n, count, room), room);
    std::vector<int32_t>& ids = room.ids;
    const int64_t found = ids.size();
    if (found <= count) return;
    const int64_t padded = (found + LANES - 1) / LANES * LANES;
    room.values.assign(padded, -INFINITY);
    room.keys.resize(padded);
    for (int64_t i = 0; i < found; ++i) room.values[i] = x[ids[i]];
    for (int64_t i = 0; i < padded; i += LANES) {
        *reinterpret_cast<i16_unaligned*>(&room.keys[i]) = keys_of(load(&room.values[i]));
    }
    const int32_t edge = edge_of(room.keys.data(), padded, count, count);
    int64_t above = 0, kept = 0;
    for (int64_t i = 0; i < found; ++i) above += room.keys[i] > edge;
    for (int64_t i = 0, on_edge = count - above; i < found; ++i) {
        const bool is_edge = room.keys[i] == edge;
        ids[kept] = ids[i];
        kept += room.keys[i] > edge || (is_edge && on_edge > 0);
        on_edge -= is_edge;
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
            w8 sum = {};
            for (int64_t j = i; j < i + BLOCK; j += 2 * LANES) {
                const u16 x = load(w + j), y = load(w + j + LANES);
                const u16 a = x >= u16{} + least ? x : u16{}, b = y >= u16{} + least ? y : u16{};
                store(w + j, a);
                store(w + j + LANES, b);
                sum += sum_of(a, b);
            }
            sums[i / BLOCK] = sum_of(sum);
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

// Weights 2^(steepness * (x - best)) of x[n]: calls keep(i, weights from i on) and close(block, its sum).
template <class Keep, class Close>
INLINE void each_weight(const float* x, int64_t n, float best, float steepness, Keep keep, Close close) {
    for (int64_t i = 0; i < n; i += BLOCK) {
        alignas(64) float tail[BLOCK];
        const float* from = x + i;
        if (i + BLOCK > n) {
            std::fill_n(tail, BLOCK, -INFINITY);
            std::copy(x + i, x + n, tail);
            from = tail;
        }
        w8 sum = {};
        for (int64_t j = 0; j < BLOCK; j += 2 * LANES) {
            const u16 a = weight((load(from + j) - best) * steepness);
            const u16 b = weight((load(from + j + LANES) - best) * steepness);
            keep(i + j, a);
            keep(i + j + LANES, b);
            sum += sum_of(a, b);
        }
        close(i / BLOCK, sum);
    }
}

Weights weigh(const float* x, int64_t n, float best, float steepness, Room& room) {
    const int64_t padded = whole_blocks(n);
    room.weights.resize(padded);
    room.sums.resize(padded / BLOCK);
    uint32_t* w = room.weights.data();
    uint64_t* sums = room.sums.data();
    each_weight(
        x, n, best, steepness, [=](int64_t i, u16 weights) INLINE_BODY { store(w + i, weights); },
        [=](int64_t block, w8 sum) INLINE_BODY { sums[block] = sum_of(sum); });
    return {w, sums, padded};
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
        const float less = x[id] / row.repetition, more = x[id] * row.repetition, seen = x[id] > 0 ? less : more;
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

// Natural log-probabilities of the model itself: of the likeliest tokens, best first; gives what to subtract from a
// logit for any other.
double measure(const SamplingBatch& batch, int64_t index, const float* x, float best, Room& room) {
    const int64_t n = batch.vocab, count = std::min<int64_t>(batch.rows[index]->logprobs, n);
    w8 sums = {};
    each_weight(
        x, n, best, 1.44269504f, [](int64_t, u16) INLINE_BODY {}, [&](int64_t, w8 sum) INLINE_BODY { sums += sum; });
    const double total = best + std::log(static_cast<double>(sum_of(sums)) / HEAVIEST);
    if (count == 0) return total;
    largest(x, n, count, room);
    std::sort(room.ids.begin(), room.ids.end(),
              [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
    for (size_t i = 0; i < room.ids.size(); ++i) {
        batch.top_ids[index * batch.most + i] = room.ids[i];
        batch.top_logprobs[index * batch.most + i] = x[room.ids[i]] - total;
    }
    return total;
}

void sample_rows(const SamplingBatch& batch, int64_t from, int64_t last) {
    static thread_local Room room;
    const int64_t n = batch.vocab;
    for (int64_t index = from; index < last; ++index) {
        SamplingRow& row = *batch.rows[index];
        const float* x = batch.logits + index * n;
        const float best = maximum(x, n);
        const bool measures = row.logprobs >= 0;
        const double total = measures ? measure(batch, index, x, best, room) : 0;  // first: x is near by now
        const float* y = adjusted(row, x, n, room);
        const int64_t token = pick(row, y, n, x == y ? best : maximum(y, n), room);
        batch.tokens[index] = token;
        if (measures) batch.logprobs[index] = x[token] - total;
        record(row, static_cast<int32_t>(token));
    }
}

}  // namespace
}  // namespace ISA

extern const SampleRows NAME(ISA);
const SampleRows NAME(ISA) = ISA::sample_rows;
