// What the halves of a layer share in a prefill: how tokens and outputs are cut into blocks.
#pragma once

#include "gemm.h"
#include "linear.h"
#include "tokens.h"

namespace ISA {

constexpr int64_t TOGETHER = 16;         // tokens that a thread takes at a time where each is worked on alone
constexpr int64_t TOKENS_AT_ONCE = 512;  // that a thread multiplies with a block of weights once it is in panels

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

}  // namespace ISA
