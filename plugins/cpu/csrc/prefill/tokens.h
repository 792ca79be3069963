// What the halves of a layer share in a prefill: which rows hold real tokens, and what is done to each row alone.
#pragma once

#include "gemm.h"
#include "linear.h"

namespace ISA {

constexpr int64_t TOGETHER = 16;         // tokens that a thread takes at a time where each is worked on alone
constexpr int64_t TOKENS_AT_ONCE = 512;  // that a thread multiplies with a block of weights once it is in panels

// The real tokens of right-padded sequences, side by side.
struct Tokens {
    int64_t count = 0;
    int64_t* rows = nullptr;   // [count]: where each lies among all B * S
    int64_t* begin = nullptr;  // [B + 1]: the first of each sequence among the real ones

    Tokens(const int32_t* lengths, int64_t batch, int64_t sequence, Scratch& scratch)
        : rows(scratch.take<int64_t>(batch * sequence)), begin(scratch.take<int64_t>(batch + 1)) {
        for (int64_t b = 0; b < batch; ++b) {
            begin[b] = count;
            const int64_t real = std::clamp<int64_t>(lengths[b], 0, sequence);
            for (int64_t s = 0; s < real; ++s) rows[count++] = b * sequence + s;
        }
        begin[batch] = count;
    }
    int64_t length(int64_t b) const { return begin[b + 1] - begin[b]; }
};

// Calls body(from, last) for blocks of `size` among `items`, shared out.
template <class Body>
inline void share_blocks(Team& team, int phase, int64_t items, int64_t size, Body body) {
    team.share(phase, (items + size - 1) / size,
        [&](int64_t block) { body(block * size, std::min((block + 1) * size, items)); });
}

// Outputs that a thread computes at a time, so that all threads have some.
inline int64_t rows_a_block(const Team& team, int64_t rows) {
    int64_t block = ROW_BLOCK;
    while (block > LANES && rows / block < 4 * team.count) block -= LANES;
    return block;
}

// y += factor * x
inline void add_scaled(const float* x, float factor, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, fma(load(x + i), all(factor), load(y + i)));
    for (; i < n; ++i) y[i] = std::fma(x[i], factor, y[i]);
}

// Rows of padding stay as they are.
inline void copy_padding(const Tokens& tokens, Team& team, int64_t rows, int64_t width, const float* x, float* y) {
    if (team.thread != 0) return;
    for (int64_t row = 0, t = 0; row < rows; ++row) {
        if (t < tokens.count && tokens.rows[t] == row) {
            ++t;
        } else {
            std::memcpy(y + row * width, x + row * width, width * sizeof(float));
        }
    }
}

}  // namespace ISA
