// Products of fp8 weight rows with a few tokens, which stay float32: codes become numbers in registers.
//
// Numbers are summed over columns in two times 16 lanes, 16 columns for the one and 16 for the other in turn, then
// across lanes in a fixed order: a product depends on neither how many rows or tokens are computed together, nor on
// the instruction set.
#pragma once

#include <algorithm>

#include "vec.h"

namespace ISA {

// A code of float8 E4M3. Its lower seven bits, shifted, are a half-precision number that is 256 times too small;
// subnormal codes are such numbers, too. NaN becomes 480: export writes none.
struct Fp8 {
    uint8_t bits;
};

constexpr int64_t FP8_BLOCK = 128;  // rows and columns that share a scale
constexpr float FP8_FACTOR = 256.0f;

typedef int8_t b16 __attribute__((vector_size(16), aligned(1)));
typedef uint16_t bits16 __attribute__((vector_size(32)));

// Sixteen numbers, each divided by FP8_FACTOR. Widened with its sign, a code has that at the place where it belongs,
// and once more beside it.
INLINE v16 load(const Fp8* p) {
    typedef int16_t wide16 __attribute__((vector_size(32)));
    const wide16 wide = __builtin_convertvector(*reinterpret_cast<const b16*>(p), wide16);
    const bits16 half = (reinterpret_cast<bits16>(wide) << 7) & static_cast<uint16_t>(0xbfff);
    return __builtin_convertvector(reinterpret_cast<f16x16>(half), v16);
}
INLINE float one(const Fp8* p) {
    const uint16_t bits = static_cast<uint16_t>((p->bits & 0x80) << 8 | (p->bits & 0x7f) << 7);
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
}

// An fp8 matrix, or a stack of matrices whose blocks begin anew in each.
struct Fp8Rows {
    const Fp8* codes;
    const float* scales;
    int64_t columns, each, row_blocks, column_blocks;

    explicit Fp8Rows(const Matrix& m)
        : codes(reinterpret_cast<const Fp8*>(m.data)),
          scales(reinterpret_cast<const float*>(m.scales)),
          columns(m.columns),
          each(m.each),
          row_blocks((m.each + FP8_BLOCK - 1) / FP8_BLOCK),
          column_blocks(m.scale_columns) {}
    const Fp8* at(int64_t row) const { return codes + row * columns; }
    const float* scales_of(int64_t row) const {
        return scales + (row / each * row_blocks + row % each / FP8_BLOCK) * column_blocks;
    }
};

// y[t][at] = w[row] . x[t] for N tokens.
template <int N>
INLINE void fp8_dots(const Fp8Rows& w, int64_t row, const float* const* x, float* const* y, int64_t at) {
    v16 totals[N][2] = {};
    const Fp8* codes = w.at(row);
    const float* scale = w.scales_of(row);
    for (int64_t from = 0; from < w.columns; from += FP8_BLOCK, ++scale) {
        const int64_t last = std::min(from + FP8_BLOCK, w.columns);
        const float factor = *scale * FP8_FACTOR;
        int64_t c = from;
        for (; c + 2 * LANES <= last; c += 2 * LANES)
            for (int h = 0; h < 2; ++h) {
                const v16 numbers = load(codes + c + h * LANES) * factor;
                for (int t = 0; t < N; ++t) totals[t][h] = fma(numbers, load(x[t] + c + h * LANES), totals[t][h]);
            }
        for (int h = 0; c < last; c += LANES, ++h) {
            const int64_t some = std::min<int64_t>(last - c, LANES);
            const v16 numbers = load_some(codes + c, some) * factor;
            for (int t = 0; t < N; ++t) totals[t][h] = fma(numbers, load_some(x[t] + c, some), totals[t][h]);
        }
    }
    for (int t = 0; t < N; ++t) y[t][at] = sum(totals[t][0] + totals[t][1]);
}

// N tokens and then fewer, so that they stay in the first cache while all rows pass.
template <int N>
INLINE void fp8_rows(
    const Fp8Rows& w, int64_t first, int64_t last, const float* const* x, int64_t tokens, float* const* y) {
    int64_t t = 0;
    for (; t + N <= tokens; t += N)
        for (int64_t r = first; r < last; ++r) fp8_dots<N>(w, r, x + t, y + t, r - first);
    if constexpr (N > 1) fp8_rows<N / 2>(w, first, last, x + t, tokens - t, y + t);
}

// y[t][r - first] = w[r] . x[t] for rows first..last and all tokens.
__attribute__((noinline)) inline void fp8_times(
    const Matrix& m, int64_t first, int64_t last, const float* const* x, int64_t tokens, float* const* y) {
#ifdef __AVX512F__
    constexpr int TOGETHER = 8;
#else
    constexpr int TOGETHER = 4;
#endif
    fp8_rows<TOGETHER>(Fp8Rows(m), first, last, x, tokens, y);
}

}  // namespace ISA
