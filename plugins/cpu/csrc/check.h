// What the kernels rely on, checked before they run: they trust every number after that.
#pragma once

#include <stdexcept>
#include <string>

#include "args.h"

namespace check {

inline void require(bool fits, const char* what) {
    if (!fits) throw std::runtime_error(std::string(what) + " does not fit the other inputs");
}

// `m` has so many rows and columns; where it is narrow, a scale for each group or block.
inline void shape(const Matrix& m, int64_t rows, int64_t columns, const char* what) {
    constexpr int64_t GROUP = 32, BLOCK = 128;
    require(m.data != nullptr && m.rows == rows && m.columns == columns, what);
    if (m.format == Format::WHOLE) return;
    int64_t scale_rows = rows, scale_columns = columns / GROUP;
    if (m.format == Format::FP8) {
        require(m.each > 0 && rows % m.each == 0, what);
        scale_rows = rows / m.each * ((m.each + BLOCK - 1) / BLOCK), scale_columns = (columns + BLOCK - 1) / BLOCK;
    } else {
        require(m.columns % GROUP == 0, what);
    }
    require(m.scales && m.scale_rows == scale_rows && m.scale_columns == scale_columns,
        (std::string(what) + "_scale").c_str());
}

// `m`, where the model has it, holds so many numbers.
inline void vector(const Matrix& m, int64_t count, const char* what) {
    require(m.data == nullptr || m.rows * m.columns == count, what);
}

inline void number(int64_t value, int64_t from, int64_t to, const char* what) {
    if (value >= from && value < to) return;
    throw std::runtime_error(std::string(what) + " " + std::to_string(value) + ": must lie in " + std::to_string(from)
        + ".." + std::to_string(to - 1));
}

// The pages of row `b` up to its last token; `made` new ones come after the cached.
inline void pages(const AttentionArgs& a, int64_t b, int64_t made) {
    number(a.past_lengths[b], 0, a.table_width * a.page - made + 1, "past_lengths holds");
    const int64_t reached = (a.past_lengths[b] + made + a.page - 1) / a.page;
    for (int64_t i = 0; i < reached; ++i) number(a.page_table[b * a.table_width + i], 0, a.pages, "page_table holds");
}

inline void args(const AttentionArgs& a) {
    const int64_t D = a.kv_a.rows, R = D - a.rank, inner = a.q_a.data ? a.q_a.rows : a.hidden;
    require(a.sequence > 0 && a.tokens == a.batch * a.sequence && a.sequences == a.batch, "x or sequence_lengths");
    require(a.batch > 0 && a.hidden > 0 && a.heads > 0 && a.nope > 0 && a.value > 0 && a.rank > 0, "a shape");
    require(R > 0 && R % 2 == 0 && a.latent == D && a.page > 0 && a.pages > 0, "past");
    if (a.cache != CacheFormat::WHOLE) {
        number(static_cast<int64_t>(a.cache), 1, 3, "cache_format");
        number(a.group, 1, a.rank + 1, "cache_group");
        require(a.rank % a.group == 0 && a.codes == a.rank && a.rest_width == R + a.rank / a.group, "past_rope");
        require(a.rest_rows == a.pages * a.page, "past_rope");
    }
    require(a.rope_rows == a.tokens && a.rope == R / 2, "cos or sin");
    require(a.table_rows == a.batch && a.table_width > 0 && a.lengths == a.batch, "page_table or past_lengths");
    shape(a.kv_a, D, a.hidden, "kv_a");
    if (a.q_a.data) shape(a.q_a, inner, a.hidden, "q_a");
    shape(a.q, a.heads * (a.nope + R), inner, "q");
    shape(a.w_uk, a.heads * a.nope, a.rank, "w_uk");
    require(a.w_uv.data && a.w_uv.rows * a.w_uv.columns == a.heads * a.value * a.rank, "w_uv");
    shape(a.o, a.hidden, a.heads * a.value, "o");
    shape(a.norm, 1, a.hidden, "norm_weight");
    shape(a.kv_norm, 1, a.rank, "kv_norm_weight");
    if (a.q_a.data) shape(a.q_norm, 1, inner, "q_norm_weight");
    vector(a.q_a_bias, inner, "q_a_bias");
    vector(a.kv_a_bias, D, "kv_a_bias");
    vector(a.o_bias, a.hidden, "o_bias");
    for (int64_t b = 0; b < a.batch; ++b) {
        number(a.sequence_lengths[b], 0, a.sequence + 1, "sequence_lengths holds");
        pages(a, b, a.sequence_lengths[b]);
    }
}

// Real tokens among those of each of `batch` sequences.
inline void lengths(const int32_t* of, int64_t batch, int64_t tokens) {
    require(batch > 0 && tokens > 0 && tokens % batch == 0, "sequence_lengths");
    for (int64_t b = 0; b < batch; ++b) number(of[b], 0, tokens / batch + 1, "sequence_lengths holds");
}

inline void mlp(const Mlp& m, int64_t width, int64_t hidden) {
    shape(m.gate, width, hidden, "shared_gate");
    shape(m.up, width, hidden, "shared_up");
    shape(m.down, hidden, width, "shared_down");
    vector(m.gate_bias, width, "shared_gate_bias");
    vector(m.up_bias, width, "shared_up_bias");
    vector(m.down_bias, hidden, "shared_down_bias");
}

inline void args(const FeedForwardArgs& a) {
    require(a.hidden > 0, "x");
    lengths(a.sequence_lengths, a.batch, a.tokens);
    shape(a.norm, 1, a.hidden, "norm_weight");
    number(static_cast<int64_t>(a.activation), 0, ACTIVATIONS, "activation");
    if (a.shared.gate.data) mlp(a.shared, a.shared.gate.rows, a.hidden);
    if (a.experts == 0) return;
    require(a.experts > 0 && a.expert_width > 0, "router");
    shape(a.router, a.experts, a.hidden, "router");
    shape(a.gate, a.experts * a.expert_width, a.hidden, "gate");
    shape(a.up, a.experts * a.expert_width, a.hidden, "up");
    shape(a.down, a.experts * a.hidden, a.expert_width, "down");
    require(a.bias == nullptr || a.biases == a.experts, "correction");
    number(a.groups, 1, a.experts + 1, "groups");
    require(a.experts % a.groups == 0, "groups");
    number(a.top_groups, 1, a.groups + 1, "top_groups");
    number(a.top_k, 1, a.experts + 1, "top_k");
}

inline void args(const HeadArgs& a) {
    require(a.tokens > 0 && a.hidden > 0 && a.head.rows > 0, "x");
    if (a.sequence_lengths) lengths(a.sequence_lengths, a.batch, a.tokens);
    shape(a.norm, 1, a.hidden, "norm_weight");
    shape(a.head, a.head.rows, a.hidden, "head");
}

}  // namespace check
