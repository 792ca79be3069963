// Kernels that compute nothing: the first row of their output says what they were given.
//
// Of every input its first number (0 where it is missing), then its size where it is a matrix, and where that is narrow
// its format and the same of its scales; then sizes and attributes, in the order that
// tests/plugins/cpu/test_operators.py has them in.
#include "args.h"

namespace {

struct Row {
    float* y;

    void add(double value) { *y++ = static_cast<float>(value); }
    template <class T>
    void first(const T* data) {
        add(data ? static_cast<double>(*data) : 0);
    }
    void add(const Matrix& m) {
        if (m.format == Format::INT8)
            first(reinterpret_cast<const int8_t*>(m.data));
        else if (m.format != Format::WHOLE)
            first(reinterpret_cast<const uint8_t*>(m.data));
        else
            first(reinterpret_cast<const float*>(m.data));
        all(m.rows, m.columns);
        if (m.format == Format::WHOLE) return;
        add(static_cast<int>(m.format));
        if (m.format == Format::FP8)
            first(reinterpret_cast<const float*>(m.scales));
        else
            first(reinterpret_cast<const _Float16*>(m.scales));
        all(m.scale_rows, m.scale_columns);
    }
    template <class... Values>
    void all(const Values&... values) {
        (add(values), ...);
    }
};

void attention(const AttentionArgs& a, Pool&) {
    Row row{a.y};
    row.first(a.x), row.first(a.cos), row.first(a.sin);
    const bool is_narrow = a.cache != CacheFormat::WHOLE;
    if (is_narrow) row.first(reinterpret_cast<const int8_t*>(a.pool));
    const char* floats = is_narrow ? a.rest : a.pool;
    if (a.pool_type == Type::FLOAT16) {
        row.first(reinterpret_cast<const _Float16*>(floats));
    } else {
        row.first(reinterpret_cast<const float*>(floats));
    }
    row.first(a.page_table), row.first(a.past_lengths), row.first(a.sequence_lengths);
    row.all(a.norm, a.kv_a, a.kv_norm, a.w_uk, a.w_uv, a.o, a.q, a.q_a, a.q_norm, a.kv_a_bias, a.o_bias, a.q_a_bias);
    row.all(a.batch, a.hidden, a.pages, a.page, a.table_width, a.heads, a.nope, a.value, a.rank, a.sequence);
    if (is_narrow) row.all(a.codes, a.rest_width);
    row.all(a.scale, a.eps, a.latent_eps);
    if (is_narrow) row.all(static_cast<int>(a.cache), a.group);
}

void feed_forward(const FeedForwardArgs& a, Pool&) {
    Row row{a.y};
    row.first(a.x), row.first(a.bias), row.first(a.sequence_lengths);
    row.all(a.norm, a.router, a.gate, a.up, a.down);
    const Mlp& s = a.shared;
    row.all(s.gate, s.up, s.down, s.gate_bias, s.up_bias, s.down_bias);
    row.all(a.tokens, a.hidden, a.experts, a.expert_width, a.batch);
    row.all(a.eps, static_cast<int>(a.activation), a.top_k, a.groups, a.top_groups, a.normalised, a.factor);
}

void head(const HeadArgs& a, Pool&) {
    Row row{a.y};
    row.first(a.x), row.first(a.sequence_lengths);
    row.all(a.norm, a.head, a.tokens, a.hidden, a.batch, a.eps);
}

}  // namespace

extern const Kernels kernels_v3, kernels_v4;
const Kernels kernels_v3{attention, feed_forward, head, attention, feed_forward};
const Kernels kernels_v4 = kernels_v3;
