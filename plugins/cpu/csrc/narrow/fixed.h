// Tokens as 16-bit integers, as narrow weights are multiplied with them: each GROUP of numbers has a scale of its own,
// the group's largest by 32767, so that none is off by more than 2^-16 of that one.
//
// A row of tokens that narrow weights read has room behind its `width` numbers for
//   codes of pairs of groups, 32 words each: numbers 0, 2 .. 30 of either group, then numbers 1, 3 .. 31 of either;
//   the groups' scales, then -8 times the groups' sums, both filled up with zeros to whole STRETCHes.
// What lacks of the last pair is zero, too.
#pragma once

#include "scratch.h"
#include "vec.h"

namespace ISA {

constexpr int64_t GROUP = 32;    // numbers that share a scale, of weights and of tokens
constexpr int64_t STRETCH = 16;  // groups whose scales are read together
constexpr int64_t PAIR = 2 * GROUP;

inline int64_t pairs_of(int64_t width) { return (width + PAIR - 1) / PAIR; }
inline int64_t scales_of(int64_t width) { return (width / GROUP + STRETCH - 1) / STRETCH * STRETCH; }

// The integers behind a row of `width` numbers.
struct Fixed {
    int16_t* codes;
    float *scales, *offsets;

    Fixed() = default;
    Fixed(const float* row, int64_t width)
        : codes(reinterpret_cast<int16_t*>(const_cast<float*>(row) + width)),
          scales(const_cast<float*>(row) + width + pairs_of(width) * (PAIR / 2)),
          offsets(scales + scales_of(width)) {}
};

// Floats that a row takes with its integers.
inline int64_t fixed_width(int64_t width) {
    const int64_t whole = (width + LANES - 1) / LANES * LANES;
    return whole + pairs_of(width) * (PAIR / 2) + 2 * scales_of(width);
}

// A table of rows of tokens, with room for their integers where they are `narrow`: where narrow weights read them.
inline float** take_tokens(Scratch& scratch, int64_t rows, int64_t width, bool narrow) {
    return scratch.take_rows(rows, narrow ? fixed_width(width) : width);
}

// Group g of a row. Where not all of it is finite, its scale is NaN, and so is every product.
inline void fix_group(float* row, int64_t width, int64_t g) {
    typedef int16_t words __attribute__((vector_size(32)));
    constexpr uint32_t INFINITE = 0x7f800000;
    constexpr float LEAST = 0x1p-110f;  // a group of smaller ones is zero: beside them no quotient would overflow
    const Fixed to(row, width);
    const v16 a = load(row + g * GROUP), b = load(row + g * GROUP + LANES);
    // As integers, magnitudes have the order that they have as numbers, and what is not finite is largest.
    const u16 sizes =
        __builtin_elementwise_max(reinterpret_cast<u16>(a) & 0x7fffffffu, reinterpret_cast<u16>(b) & 0x7fffffffu);
    const uint32_t bits = __builtin_reduce_max(sizes);
    float most;
    std::memcpy(&most, &bits, sizeof most);
    const bool is_finite = bits < INFINITE, is_zero = !is_finite || most < LEAST;
    to.scales[g] = !is_finite ? NAN : is_zero ? 0.0f : most / 32767.0f;
    const v16 inverse = all(is_zero ? 0.0f : 32767.0f / most);
    const auto whole = [&](v16 x) INLINE_BODY {
        return __builtin_convertvector(__builtin_elementwise_roundeven(is_finite ? x * inverse : v16{}), i16);
    };
    const i16 c = whole(a), d = whole(b);
    to.offsets[g] = -8.0f * static_cast<float>(__builtin_reduce_add(c + d));  // exact: less than 2^24
    const i16 even = __builtin_shufflevector(c, d, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const i16 odd = __builtin_shufflevector(c, d, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    int16_t* codes = to.codes + g / 2 * PAIR + g % 2 * LANES;
    *reinterpret_cast<words*>(codes) = __builtin_convertvector(even, words);
    *reinterpret_cast<words*>(codes + GROUP) = __builtin_convertvector(odd, words);
}

// What lies behind the last group.
inline void fix_rest(float* row, int64_t width) {
    const Fixed to(row, width);
    const int64_t groups = width / GROUP;
    for (int64_t g = groups; g < scales_of(width); ++g) to.scales[g] = to.offsets[g] = 0.0f;
    if (groups % 2 == 0) return;
    int16_t* codes = to.codes + groups / 2 * PAIR + LANES;
    std::memset(codes, 0, LANES * sizeof(int16_t));
    std::memset(codes + GROUP, 0, LANES * sizeof(int16_t));
}

inline void fix(float* row, int64_t width) {
    for (int64_t g = 0; g < width / GROUP; ++g) fix_group(row, width, g);
    fix_rest(row, width);
}

inline void fix_all(float* const* rows, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) fix(rows[i], width);
}

}  // namespace ISA
