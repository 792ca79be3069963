// Vectors of 16 logits for one instruction set.
#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

namespace ISA {
namespace {

typedef bool bits16 __attribute__((ext_vector_type(16)));
typedef uint64_t w8 __attribute__((vector_size(64)));
typedef double d8 __attribute__((vector_size(64)));

constexpr int64_t BLOCK = 256;  // logits with maxima and a sum of their own
constexpr double HEAVIEST = 1 << 30;
constexpr float LOWEST = -3.402823466e38f;

INLINE v16 larger(v16 a, v16 b) { return a > b ? a : b; }
// Sums of two vectors, in pairs of lanes: two weights fit into 32 bits together, more need not.
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

// 2^(30 + y) for y <= 0: 2^n from the bits of a sum, times a polynomial of the rest, off by at most 1e-7 of the value.
INLINE v16 power(v16 y) {
    constexpr float shift = 12582912.0f, scale = 1 << 30;  // 1.5 * 2^23
    y = larger(y, all(-80.0f));
    const v16 shifted = y + shift;
    const v16 r = y - (shifted - shift);
    v16 p = all(1.326472614891827e-3f * scale);
    for (float c : {9.671512991189957e-3f, 5.550733581185341e-2f, 0.24022242426872253f, 0.6931470036506653f, 1.0f})
        p = __builtin_elementwise_fma(p, r, all(c * scale));
    return reinterpret_cast<v16>(reinterpret_cast<i16>(p) + (reinterpret_cast<i16>(shifted) << 23));
}

INLINE float maximum(v16 x) {
    float result = x[0];
    for (int lane = 1; lane < LANES; ++lane) result = std::max(result, x[lane]);
    return result;
}

// Whether one of x[n] is NaN.
bool has_nan(const float* x, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= x[i] != x[i];
    return found;
}

// The largest of x[n], NaN where one is NaN. maxima gets the largest of each lane of each whole block.
float maximum(const float* x, int64_t n, std::vector<float>& maxima) {
    maxima.resize(n / BLOCK * LANES);
    v16 most = all(LOWEST), sum = {};  // `larger` loses a NaN, a sum keeps it
    for (int64_t block = 0; block < n / BLOCK; ++block) {
        const float* from = x + block * BLOCK;
        v16 best[4] = {load(from), load(from + LANES), load(from + 2 * LANES), load(from + 3 * LANES)};
        sum += (best[0] + best[1]) + (best[2] + best[3]);
        for (int64_t j = 4; j < BLOCK / LANES; j += 4) {
            const v16 a = load(from + j * LANES), b = load(from + (j + 1) * LANES);
            best[0] = larger(a, best[0]);
            best[1] = larger(b, best[1]);
            const v16 c = load(from + (j + 2) * LANES), d = load(from + (j + 3) * LANES);
            best[2] = larger(c, best[2]);
            best[3] = larger(d, best[3]);
            sum += (a + b) + (c + d);
        }
        const v16 together = larger(larger(best[0], best[1]), larger(best[2], best[3]));
        store(&maxima[block * LANES], together);
        most = larger(together, most);
    }
    float result = maximum(most);
    const int64_t whole = n / BLOCK * BLOCK;
    for (int64_t i = whole; i < n; ++i) result = std::max(result, x[i]);
    const bool suspicious = any(sum != sum);  // infinities of both signs give NaN, too
    return (suspicious && has_nan(x, whole)) || has_nan(x + whole, n - whole) ? NAN : result;
}

// Where the value first comes in x[n], or n.
template <class T>
int64_t place_of(T value, const T* x, int64_t n) {
    int64_t i = 0;
    while (i + LANES <= n && !any(load(x + i) == value)) i += LANES;
    while (i < n && x[i] != value) ++i;
    return i;
}

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

// Calls use(block, values) for every BLOCK values of x[n], the last ones filled up with -infinity.
template <class Use>
INLINE void each_block(const float* x, int64_t n, Use use) {
    const int64_t whole = n / BLOCK;
    for (int64_t block = 0; block < whole; ++block) use(block, x + block * BLOCK);
    if (whole * BLOCK == n) return;
    alignas(64) float tail[BLOCK];
    std::fill_n(tail, BLOCK, -INFINITY);
    std::copy(x + whole * BLOCK, x + n, tail);
    use(whole, tail);
}

}  // namespace
}  // namespace ISA
