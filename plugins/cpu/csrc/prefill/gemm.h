// Products of weights with many tokens, bound by arithmetic: blocks of weights are brought into panels of float32.
//
// Lanes are outputs, so a number is summed over columns in their order: blocks of K_BLOCK columns each from zero, then
// block after block. It does not depend on how many tokens or outputs are computed together.
#pragma once

#include <algorithm>

#include "fp8.h"
#include "narrow.h"
#include "scratch.h"
#include "vec.h"

namespace ISA {

constexpr int64_t K_BLOCK = 256;  // a panel of so many columns fills half of the first cache
#ifdef __AVX512F__
constexpr int TILE_ROWS = 8, TILE_PANELS = 3;  // 24 sums, 3 of a panel and 1 token in 32 registers
constexpr int64_t ROW_BLOCK = 96;              // outputs that a thread computes at a time
#else
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;  // 12 sums, 2 of a panel and 1 token in 16 registers of half the width
constexpr int64_t ROW_BLOCK = 64;
#endif
constexpr int64_t TOKEN_BLOCK = 192;  // whose columns of one block stay in the second cache

// Numbers that lie in panels: element (k, lane) of panel p is at data[p * panel + k * step + lane].
struct Panels {
    const float* data;
    int64_t panel, step;
};

// A row's length in scratch memory: whole panels, and an odd number of cache lines, so that equal columns of
// neighbouring rows do not compete for the same places of a cache.
inline int64_t padded(int64_t width) {
    return (width + LANES - 1) / LANES * LANES + ((width - 1) / LANES % 2 ? LANES : 0);
}

// A table of such rows, with room for their integers where products take those.
inline float** take_padded(Scratch& scratch, int64_t rows, int64_t width, bool narrow = false) {
    return scratch.take_rows(rows, padded(narrow ? fixed_width(width) : width));
}

// y[i][at + 16 p + lane] (+)= sum over k of x[i][from + k] w(p, k, lane) for M rows and P panels.
template <int M, int P>
__attribute__((noinline)) void tile(
    const float* const* x, int64_t from, const Panels& w, int64_t depth, bool first, float* const* y, int64_t at) {
    v16 sums[M][P] = {};
    const float* rows[M];
    for (int i = 0; i < M; ++i) rows[i] = x[i] + from;
    const float* column = w.data;
#pragma clang loop unroll_count(4)
    for (int64_t k = 0; k < depth; ++k, column += w.step) {
        v16 lanes[P];
        for (int p = 0; p < P; ++p) lanes[p] = load(column + p * w.panel);
        for (int i = 0; i < M; ++i) {
            const v16 token = all(rows[i][k]);
            for (int p = 0; p < P; ++p) sums[i][p] = fma(token, lanes[p], sums[i][p]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int p = 0; p < P; ++p) {
            float* to = y[i] + at + p * LANES;
            store(to, first ? sums[i][p] : load(to) + sums[i][p]);
        }
}

// All panels, P at a time and then the rest together; rows M at a time, of which there are a multiple.
template <int M, int P>
inline void tiles(const float* const* x, int64_t from, int64_t rows, Panels w, int64_t panels, int64_t depth,
    bool first, float* const* y, int64_t at) {
    int64_t p = 0;
    // Four are two pairs: a fourth alone would have too few sums to hide what an addition takes.
    for (; p + P <= panels && !(P == 3 && panels - p == 4); p += P)
        for (int64_t i = 0; i < rows; i += M)
            tile<M, P>(x + i, from, {w.data + p * w.panel, w.panel, w.step}, depth, first, y + i, at + p * LANES);
    if constexpr (P > 1)
        if (p < panels)
            tiles<M, P - 1>(
                x, from, rows, {w.data + p * w.panel, w.panel, w.step}, panels - p, depth, first, y, at + p * LANES);
}

// At most M rows, together. Few of them take more panels, so that there are sums enough to hide what an addition takes.
template <int M>
inline void few_rows(const float* const* x, int64_t from, int64_t rows, Panels w, int64_t panels, int64_t depth,
    bool first, float* const* y) {
    constexpr int P = M == 1 ? TILE_PANELS + 3 : M == 2 ? TILE_PANELS + 1 : TILE_PANELS;
    if (rows == M) return tiles<M, P>(x, from, rows, w, panels, depth, first, y, 0);
    if constexpr (M > 1) few_rows<M - 1>(x, from, rows, w, panels, depth, first, y);
}

// y[i][lane] (+)= sum over k < depth of x[i][from + k] w(k, lane), for all rows and panels.
inline void times_panels(const float* const* x, int64_t from, int64_t rows, Panels w, int64_t panels, int64_t depth,
    bool first, float* const* y) {
    for (int64_t k = 0; k < depth; k += K_BLOCK)
        for (int64_t i = 0; i < rows; i += TOKEN_BLOCK) {
            const Panels block{w.data + k * w.step, w.panel, w.step};
            const int64_t some = std::min(TOKEN_BLOCK, rows - i), full = some / TILE_ROWS * TILE_ROWS;
            const int64_t columns = std::min(K_BLOCK, depth - k);
            const bool is_first = first && k == 0;
            tiles<TILE_ROWS, TILE_PANELS>(x + i, from + k, full, block, panels, columns, is_first, y + i, 0);
            few_rows<TILE_ROWS - 1>(
                x + i + full, from + k, some - full, block, panels, columns, is_first, y + i + full);
        }
}

INLINE v4 load4(const float* p) {
    v4 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
INLINE v4 load4(const _Float16* p) {
    typedef _Float16 f16x4 __attribute__((vector_size(8)));
    f16x4 x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, v4);
}
INLINE v4 load4(const Fp8* p) {
    typedef int8_t b4 __attribute__((vector_size(4)));
    typedef int16_t wide4 __attribute__((vector_size(8)));
    typedef uint16_t h4 __attribute__((vector_size(8)));
    typedef _Float16 f16x4 __attribute__((vector_size(8)));
    b4 x;
    std::memcpy(&x, p, sizeof x);
    const h4 half = (reinterpret_cast<h4>(__builtin_convertvector(x, wide4)) << 7) & static_cast<uint16_t>(0xbfff);
    return __builtin_convertvector(reinterpret_cast<f16x4>(half), v4);
}
INLINE v4 load4(const Bfloat16* p) {
    typedef uint16_t h4 __attribute__((vector_size(8)));
    typedef uint32_t u4 __attribute__((vector_size(16)));
    h4 x;
    std::memcpy(&x, p, sizeof x);
    return reinterpret_cast<v4>(__builtin_convertvector(x, u4) << 16);
}

// Four columns of eight rows become four runs of eight numbers, 16 apart.
template <class W>
INLINE void turn(const W* const* rows, int64_t k, float* to) {
    v8 r[4];
    for (int i = 0; i < 4; ++i)
        r[i] = __builtin_shufflevector(load4(rows[i] + k), load4(rows[i + 4] + k), 0, 1, 2, 3, 4, 5, 6, 7);
    const v8 a = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
    const v8 b = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const v8 c = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const v8 d = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
    const v8 columns[4] = {__builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13),
        __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15),
        __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13),
        __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15)};
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * LANES, &columns[i], sizeof(v8));
}

// Sixteen rows of `depth` numbers as one panel. A cache line of a row is used up at once: at many widths, equal columns
// of all rows lie in one place of the cache. Meanwhile what lies `ahead` numbers further is fetched.
template <class W>
inline void pack_panel(const W* const* rows, int64_t depth, float* to, int64_t ahead = 0) {
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES)
        for (int half = 0; half < LANES; half += 8) {
            for (int i = half; i < half + 8; ++i) __builtin_prefetch(rows[i] + k + ahead, 0, 2);
            for (int64_t i = k; i < k + LANES; i += 4) turn(rows + half, i, to + i * LANES + half);
        }
    for (; k < depth; ++k)
        for (int i = 0; i < LANES; ++i) to[k * LANES + i] = one(rows[i] + k);
}

// What `pack` does, of codes: they are multiplied by their scales once they lie in the panel.
inline void pack_fp8(const Fp8Rows& w, int64_t first, int64_t last, int64_t from, int64_t depth, float* to) {
    static_assert(K_BLOCK % FP8_BLOCK == 0, "a panel begins where a block does");
    static const Fp8 zeros[K_BLOCK] = {};
    static const float none[K_BLOCK / FP8_BLOCK] = {};
    for (int64_t r = first; r < last; r += LANES, to += depth * LANES) {
        const Fp8* rows[LANES];
        const float* scales[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
            rows[i] = r + i < last ? w.at(r + i) + from : zeros;
            scales[i] = r + i < last ? w.scales_of(r + i) + from / FP8_BLOCK : none;
        }
        pack_panel(rows, depth, to, LANES * w.columns);
        for (int64_t k = 0; k < depth; k += FP8_BLOCK) {
            v16 factors;
            for (int i = 0; i < LANES; ++i) factors[i] = scales[i][k / FP8_BLOCK] * FP8_FACTOR;
            for (int64_t c = k; c < std::min(k + FP8_BLOCK, depth); ++c)
                store(to + c * LANES, load(to + c * LANES) * factors);
        }
    }
}

// Columns from..from + depth of rows first..last, as panels; rows that fill up the last panel are zero.
inline void pack(const Matrix& m, int64_t first, int64_t last, int64_t from, int64_t depth, float* to) {
    if (m.format == Format::FP8) return pack_fp8(Fp8Rows(m), first, last, from, depth, to);
    static const float zeros[K_BLOCK] = {};
    with_type(m.data, m.type, [&](auto* data) {
        for (int64_t r = first; r < last; r += LANES, to += depth * LANES) {
            const std::remove_pointer_t<decltype(data)>* rows[LANES];
            for (int64_t i = 0; i < LANES; ++i)
                rows[i] = r + i < last ? data + (r + i) * m.columns + from : reinterpret_cast<decltype(data)>(zeros);
            pack_panel(rows, depth, to, LANES * m.columns);
        }
    });
}

// Room for the panels of ROW_BLOCK outputs.
inline float* take_panels(Scratch& scratch) { return scratch.take(ROW_BLOCK * K_BLOCK); }

// y[t][r - first] = w[r] . x[t] for at most ROW_BLOCK outputs first..last; rows of y have room for whole panels.
inline void gemm(const Matrix& m, int64_t first, int64_t last, const float* const* x, int64_t tokens, float* const* y,
    float* packed) {
    if (m.reads_integers()) return narrow_times(m, first, last, x, tokens, y);
    for (int64_t k = 0; k < m.columns; k += K_BLOCK) {
        const int64_t depth = std::min(K_BLOCK, m.columns - k);
        pack(m, first, last, k, depth, packed);
        times_panels(
            x, k, tokens, {packed, depth * LANES, LANES}, (last - first + LANES - 1) / LANES, depth, k == 0, y);
    }
}

}  // namespace ISA
