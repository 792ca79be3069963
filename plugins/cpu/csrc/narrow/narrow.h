// Products of narrow weight rows with tokens that are 16-bit integers (fixed.h).
//
// Four products at a time are summed as integers, which float32 holds exactly: 4 * 128 * 32767 < 2^24. There are eight
// such sums a group: each is multiplied by both scales and added to a lane, eight lanes for even groups and eight for
// odd ones, in the groups' order. The lanes are summed in the end. So a number depends on neither how many rows or
// tokens are computed together, nor on the instruction set.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>

#include "fixed.h"

namespace ISA {

// A register holds half of a pair of groups, or all of it.
#ifdef __AVX512F__
constexpr int HALVES = 1;
typedef i16 integers;
typedef v16 floats;
typedef int16_t words __attribute__((vector_size(64)));
typedef uint8_t octets __attribute__((vector_size(32)));
constexpr int NARROW_TOKENS = 8;  // that are multiplied with a row together: their sums lie in registers
#else
constexpr int HALVES = 2;
typedef int32_t integers __attribute__((vector_size(32)));
typedef v8 floats;
typedef int16_t words __attribute__((vector_size(32)));
typedef uint8_t octets __attribute__((vector_size(16)));
constexpr int NARROW_TOKENS = 4;
#endif
constexpr int WORDS = sizeof(words) / 2;
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define WORDS_ARE_A_REGISTER
#endif

// Sums of products of neighbouring words.
INLINE integers pair_sums(words a, words b) {
#if defined(WORDS_ARE_A_REGISTER) && defined(__AVX512F__)
    return reinterpret_cast<integers>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(WORDS_ARE_A_REGISTER)
    return reinterpret_cast<integers>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
    const integers x = reinterpret_cast<integers>(a), y = reinterpret_cast<integers>(b);
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

INLINE words load_words(const int16_t* p) { return *reinterpret_cast<const words*>(p); }

// The numbers 0, 2 .. and 1, 3 .. of a group or two.
struct Codes {
    words even, odd;
};

struct Int8 {
    static constexpr int64_t BYTES = GROUP;  // of a group
    static constexpr bool HAS_OFFSET = false;

    static INLINE Codes read(const char* p) {
        words w;
        std::memcpy(&w, p, sizeof w);
        return {w << 8 >> 8, w >> 8};
    }
};

struct Int4 {
    static constexpr int64_t BYTES = GROUP / 2;
    static constexpr bool HAS_OFFSET = true;  // codes are 8 greater than what they stand for

    static INLINE Codes read(const char* p) {
        octets bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        words w = __builtin_convertvector(bytes, words);
#ifdef WORDS_ARE_A_REGISTER
        __asm__("" : "+v"(w));  // the compiler would widen either half on its own
#endif
        return {w & 15, w >> 4};
    }
};

// Register h of the pair of groups at p, of which there is only the first group where `single`.
template <class F>
INLINE Codes read_codes(const char* p, int h, bool single) {
    if (HALVES == 2 || !single) return F::read(p + h * F::BYTES);
    char first[2 * F::BYTES] = {};
    std::memcpy(first, p, F::BYTES);
    return F::read(first);
}

// The scales of a pair's groups, each in the lanes of its own.
INLINE floats spread(const float* scales, int h) {
#ifdef __AVX512F__
    return __builtin_shufflevector(
        all(scales[0]), all(scales[1]), 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
#else
    const float x = scales[h];
    return floats{x, x, x, x, x, x, x, x};
#endif
}

INLINE floats add_products(Codes w, Codes x, floats scales, floats total) {
    const integers four = pair_sums(w.even, x.even) + pair_sums(w.odd, x.odd);
    return __builtin_elementwise_fma(__builtin_convertvector(four, floats), scales, total);
}

// What codes that are 8 too great add too much, in lanes of groups.
INLINE floats add_offsets(const float* offsets, const float* scales, int h, floats total) {
    floats x, y;
    std::memcpy(&x, offsets + h * WORDS / 2, sizeof x);
    std::memcpy(&y, scales + h * WORDS / 2, sizeof y);
    return __builtin_elementwise_fma(x, y, total);
}

INLINE Codes token_codes(const int16_t* pair, int h) {
    return {load_words(pair + h * WORDS), load_words(pair + GROUP + h * WORDS)};
}

// The scales of a STRETCH at p, of which `groups` are left; zeros behind the last. `left`: scales in memory from there
// on, of this row and those that follow.
INLINE v16 load_scales(const _Float16* p, int64_t groups, int64_t left) {
    const i16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (groups >= STRETCH) return load(p);
    if (left < STRETCH) return load_some(p, groups);
    return place < static_cast<int32_t>(groups) ? load(p) : v16{};
}

// A narrow matrix as the products read it.
template <class F>
struct NarrowRows {
    const char* codes;
    const _Float16* scales;
    int64_t groups, all_groups;  // of a row, of all rows

    explicit NarrowRows(const Matrix& m)
        : codes(m.data),
          scales(reinterpret_cast<const _Float16*>(m.scales)),
          groups(m.columns / GROUP),
          all_groups(m.rows * groups) {}
    const char* at(int64_t row, int64_t g) const { return codes + (row * groups + g) * F::BYTES; }
    // Asks for what is needed next.
    INLINE_BODY void fetch_from(const char* now, int64_t row, int64_t g) const {
        for (int64_t i = 0; i < STRETCH * F::BYTES; i += 64) fetch(now + i);
        __builtin_prefetch(scales + row * groups + g + AHEAD / F::BYTES);
    }
    v16 scales_at(int64_t row, int64_t g) const {
        return load_scales(scales + row * groups + g, groups - g, all_groups - (row * groups + g));
    }
};

// y[t][at] = w[row] . x[t] for N tokens: the row's codes become words in registers.
template <int N, class F>
INLINE void narrow_dots(const NarrowRows<F>& w, int64_t row, const Fixed* x, float* const* y, int64_t at) {
    floats totals[N][HALVES] = {};
    for (int64_t g = 0; g < w.groups; g += STRETCH) {
        const int64_t some = std::min(STRETCH, w.groups - g);
        alignas(64) float scales[N][STRETCH];
        const v16 own = w.scales_at(row, g);
        for (int t = 0; t < N; ++t) {
            store(scales[t], own * load(x[t].scales + g));
            if constexpr (F::HAS_OFFSET)
                for (int h = 0; h < HALVES; ++h)
                    totals[t][h] = add_offsets(x[t].offsets + g, scales[t], h, totals[t][h]);
        }
        const char* codes = w.at(row, g);
        w.fetch_from(codes, row, g);
        const auto pair = [&](int64_t i, bool single) INLINE_BODY {
            for (int h = 0; h < (single ? 1 : HALVES); ++h) {
                const Codes c = read_codes<F>(codes + i * F::BYTES, h, single);
                for (int t = 0; t < N; ++t)
                    totals[t][h] = add_products(
                        c, token_codes(x[t].codes + (g + i) * GROUP, h), spread(scales[t] + i, h), totals[t][h]);
            }
        };
        int64_t i = 0;
        for (; i + 2 <= some; i += 2) pair(i, false);
        if (i < some) pair(i, true);
    }
    for (int t = 0; t < N; ++t) {
        v16 lanes;
        std::memcpy(&lanes, totals[t], sizeof lanes);
        y[t][at] = sum(lanes);
    }
}

// N tokens and then fewer, so that they stay in the first cache while all rows pass.
template <int N, class F>
INLINE void narrow_rows(const NarrowRows<F>& w, int64_t columns, int64_t first, int64_t last, const float* const* x,
    int64_t tokens, float* const* y) {
    int64_t t = 0;
    for (; t + N <= tokens; t += N) {
        Fixed fixed[N];
        for (int i = 0; i < N; ++i) fixed[i] = Fixed(x[t + i], columns);
        for (int64_t r = first; r < last; ++r) narrow_dots<N>(w, r, fixed, y + t, r - first);
    }
    if constexpr (N > 1) narrow_rows<N / 2>(w, columns, first, last, x + t, tokens - t, y + t);
}

// y[t][r - first] = w[r] . x[t] for rows first..last and all tokens, whose integers lie behind their numbers.
__attribute__((noinline)) inline void narrow_times(
    const Matrix& m, int64_t first, int64_t last, const float* const* x, int64_t tokens, float* const* y) {
    if (m.format == Format::INT4)
        narrow_rows<NARROW_TOKENS>(NarrowRows<Int4>(m), m.columns, first, last, x, tokens, y);
    else
        narrow_rows<NARROW_TOKENS>(NarrowRows<Int8>(m), m.columns, first, last, x, tokens, y);
}

}  // namespace ISA
