// Products of weight rows with a few tokens, streamed at the speed of memory.
//
// Every number is summed over columns in lanes of 16, then across lanes in a fixed order: it does not depend on how
// many rows or tokens are computed together.
#pragma once

#include "fp8.h"
#include "narrow.h"
#include "vec.h"

namespace ISA {

// One row at a time for few tokens: memory is read fastest in a single stream. Many tokens are bound by arithmetic:
// there, several rows share the loads of a token.
#ifdef __AVX512F__
constexpr int FEW = 8, ROWS = 4, TOKENS = 4;  // 16 sums, 4 rows and 1 token in 32 registers
constexpr int ADDED = 8;                      // rows that are added to a sum while it lies in a register
#else
constexpr int FEW = 4, ROWS = 2, TOKENS = 2, ADDED = 4;
#endif

// y[t][r] = w[r] . x[t] for R rows and N tokens.
template <int R, int N, class W>
INLINE void dots(const W* w, int64_t stride, const float* const* x, int64_t columns, float* const* y, int64_t at) {
    v16 totals[N][R] = {};
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        v16 rows[R];
        for (int r = 0; r < R; ++r) {
            rows[r] = load(w + r * stride + c);
            fetch(w + r * stride + c);
        }
        for (int t = 0; t < N; ++t) {
            const v16 token = load(x[t] + c);
            for (int r = 0; r < R; ++r) totals[t][r] = fma(rows[r], token, totals[t][r]);
        }
    }
    if (c < columns) {
        for (int t = 0; t < N; ++t) {
            const v16 token = load_some(x[t] + c, columns - c);
            for (int r = 0; r < R; ++r)
                totals[t][r] = fma(load_some(w + r * stride + c, columns - c), token, totals[t][r]);
        }
    }
    const v16* flat = &totals[0][0];
    int i = 0;
    for (; i + 4 <= R * N; i += 4) {
        const v4 four = sums(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]);
        for (int j = 0; j < 4; ++j) y[(i + j) / R][at + (i + j) % R] = four[j];
    }
    for (; i < R * N; ++i) y[i / R][at + i % R] = sum(flat[i]);
}

// All tokens, N at a time and then fewer.
template <int R, int N, class W>
INLINE void dots_of(
    const W* w, int64_t stride, const float* const* x, int64_t tokens, int64_t columns, float* const* y, int64_t at) {
    int64_t t = 0;
    for (; t + N <= tokens; t += N) dots<R, N>(w, stride, x + t, columns, y + t, at);
    if constexpr (N > 1) dots_of<R, N / 2>(w, stride, x + t, tokens - t, columns, y + t, at);
}

// y[t][r - first] = w[r] . x[t] for rows first..last and all tokens.
__attribute__((noinline)) inline void rows_times(
    const Matrix& m, int64_t first, int64_t last, const float* const* x, int64_t tokens, float* const* y) {
    if (m.reads_integers()) return narrow_times(m, first, last, x, tokens, y);
    if (m.format == Format::FP8) return fp8_times(m, first, last, x, tokens, y);
    with_type(m.data, m.type, [&](auto* data) {
        int64_t r = first;
        if (tokens > FEW)
            for (; r + ROWS <= last; r += ROWS)
                dots_of<ROWS, TOKENS>(data + r * m.columns, m.columns, x, tokens, m.columns, y, r - first);
        for (; r < last; ++r) dots_of<1, FEW>(data + r * m.columns, m.columns, x, tokens, m.columns, y, r - first);
    });
}

inline void add_bias(const Matrix& bias, int64_t first, int64_t last, int64_t tokens, float* const* y) {
    if (bias.data == nullptr) return;
    with_type(bias.data, bias.type, [&](auto* data) {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t r = first; r < last; ++r) y[t][r - first] += one(data + r);
    });
}

// y[t][first..last] = sum over rows n of x[t][n] w[n][first..last], rows in order; w has `stride` columns.
template <class W>
inline void columns_times(const W* w, int64_t rows, int64_t stride, int64_t first, int64_t last, const float* const* x,
    int64_t tokens, float* const* y) {
    for (int64_t t = 0; t < tokens; ++t) std::memset(y[t] + first, 0, (last - first) * sizeof(float));
    int64_t n = 0;
    for (; n + ADDED <= rows; n += ADDED) {
        const W* at = w + n * stride;
        int64_t c = first;
        for (; c + LANES <= last; c += LANES) {
            v16 row[ADDED];
            for (int i = 0; i < ADDED; ++i) {
                row[i] = load(at + i * stride + c);
                fetch(at + i * stride + c);
            }
            for (int64_t t = 0; t < tokens; ++t) {
                v16 total = load(y[t] + c);
                for (int i = 0; i < ADDED; ++i) total = fma(row[i], all(x[t][n + i]), total);
                store(y[t] + c, total);
            }
        }
        for (; c < last; ++c)
            for (int64_t t = 0; t < tokens; ++t)
                for (int i = 0; i < ADDED; ++i) y[t][c] = std::fma(one(at + i * stride + c), x[t][n + i], y[t][c]);
    }
    for (; n < rows; ++n)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = first; c < last; ++c) y[t][c] = std::fma(one(w + n * stride + c), x[t][n], y[t][c]);
}

// y = x / rms(x) * weight over `width` numbers.
inline void rms_norm(const float* x, const Matrix& weight, float eps, int64_t width, float* y) {
    v16 squares{};
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) squares = fma(load(x + c), load(x + c), squares);
    if (c < width) {
        const v16 rest = load_some(x + c, width - c);
        squares = fma(rest, rest, squares);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    with_type(weight.data, weight.type, [&](auto* w) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(y + i, load(x + i) * scale * load(w + i));
        for (; i < width; ++i) y[i] = x[i] * scale * one(w + i);
    });
}

}  // namespace ISA
