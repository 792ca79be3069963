// Which rows of right-padded sequences hold real tokens.
#pragma once

#include <algorithm>
#include <cstring>

#include "scratch.h"
#include "team.h"

namespace ISA {

// The real tokens of right-padded sequences, side by side.
struct Tokens {
    int64_t count = 0;
    int64_t* rows = nullptr;   // [count]: where each lies among all B * S
    int64_t* begin = nullptr;  // [B + 1]: the first of each sequence among the real ones

    // Every row is real, and a sequence of its own.
    Tokens(int64_t batch, Scratch& scratch)
        : count(batch), rows(scratch.take<int64_t>(batch)), begin(scratch.take<int64_t>(batch + 1)) {
        for (int64_t b = 0; b <= batch; ++b) begin[b] = b;
        std::copy(begin, begin + batch, rows);
    }

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

// Calls body(row) for the rows of padding among `rows`, on one thread.
template <class Body>
inline void each_padding(const Tokens& tokens, Team& team, int64_t rows, Body body) {
    if (team.thread != 0 || tokens.count == rows) return;
    for (int64_t row = 0, t = 0; row < rows; ++row) {
        if (t < tokens.count && tokens.rows[t] == row) {
            ++t;
        } else {
            body(row);
        }
    }
}

// Rows of padding stay as they are.
inline void copy_padding(const Tokens& tokens, Team& team, int64_t rows, int64_t width, const float* x, float* y) {
    each_padding(
        tokens, team, rows, [&](int64_t row) { std::memcpy(y + row * width, x + row * width, width * sizeof(float)); });
}

}  // namespace ISA
