// Logits as weights. They are integers, so that their sums are exact in any order: what is picked depends neither on
// the batch nor on the width of the vectors.
#pragma once

#include "sampling_largest.h"

namespace ISA {
namespace {

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
    // The sum of those that keep_likelier keeps.
    uint64_t likelier(int64_t picked) const {
        const uint32_t edge = w[picked];
        const int64_t middle = picked / BLOCK * BLOCK;
        uint64_t result = sum_above(0, middle, edge) + sum_above(middle + BLOCK, n, edge + 1);
        for (int64_t i = middle; i < middle + BLOCK; ++i) result += w[i] >= edge + (i >= picked) ? w[i] : 0;
        return result;
    }
    uint64_t sum_above(int64_t from, int64_t last, uint32_t least) const {
        w8 sum = {};
        for (int64_t j = from; j < last; j += 2 * LANES) {
            const u16 x = load(w + j), y = load(w + j + LANES);
            sum += sum_of(x >= u16{} + least ? x : u16{}, y >= u16{} + least ? y : u16{});
        }
        return sum_of(sum);
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

// Weights 2^(steepness * (x - best)), rounded down.
INLINE u16 weights_of(const float* x, float best, float steepness) {
    return reinterpret_cast<u16>(__builtin_convertvector(power((load(x) - best) * steepness), i16));
}

Weights weigh(const float* x, int64_t n, float best, float steepness, Room& room) {
    const int64_t padded = whole_blocks(n);
    room.weights.resize(padded);
    room.sums.resize(padded / BLOCK);
    uint32_t* w = room.weights.data();
    uint64_t* sums = room.sums.data();
    each_block(x, n, [=](int64_t block, const float* from) INLINE_BODY {
        w8 sum = {};
        for (int64_t j = 0; j < BLOCK; j += 2 * LANES) {
            const u16 a = weights_of(from + j, best, steepness), b = weights_of(from + j + LANES, best, steepness);
            store(w + block * BLOCK + j, a);
            store(w + block * BLOCK + j + LANES, b);
            sum += sum_of(a, b);
        }
        sums[block] = sum_of(sum);
    });
    return {w, sums, padded};
}

uint64_t total_weight(const float* x, int64_t n, float best, float steepness) {
    w8 sum = {};
    each_block(x, n, [&](int64_t, const float* from) INLINE_BODY {
        for (int64_t j = 0; j < BLOCK; j += 2 * LANES) {
            sum += sum_of(weights_of(from + j, best, steepness), weights_of(from + j + LANES, best, steepness));
        }
    });
    return sum_of(sum);
}

// The natural logarithm of the sum of e^x[n], whose largest is `best`.
double log_sum(const float* x, int64_t n, float best) {
    d8 sum = {};
    each_block(x, n, [&](int64_t, const float* from) INLINE_BODY {
        v16 a = {}, b = {};
        for (int64_t j = 0; j < BLOCK; j += 2 * LANES) {
            a += power((load(from + j) - best) * 1.44269504f);
            b += power((load(from + j + LANES) - best) * 1.44269504f);
        }
        for (v16 part : {a, b}) {
            sum += __builtin_convertvector(__builtin_shufflevector(part, part, 0, 1, 2, 3, 4, 5, 6, 7), d8);
            sum += __builtin_convertvector(__builtin_shufflevector(part, part, 8, 9, 10, 11, 12, 13, 14, 15), d8);
        }
    });
    const double total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    return best + std::log(total / HEAVIEST);
}

}  // namespace
}  // namespace ISA
