// The other half of a decoder layer: norm, router, the chosen experts, the shared ones, and the residual.
#pragma once

#include <algorithm>
#include <vector>

#include "linear.h"
#include "routing.h"
#include "scratch.h"
#include "tokens.h"

namespace ISA {

// Weight rows that a thread takes at a time; of the inner ones, a group, where what they give becomes integers.
constexpr int64_t INNER_BLOCK = 16, OUTER_BLOCK = 16, LARGEST_INNER_BLOCK = GROUP;

inline float activate(Activation kind, float x) {
    switch (kind) {
    case Activation::RELU: return x > 0.0f ? x : 0.0f;
    case Activation::GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::GELU_PYTORCH_TANH:
        return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: return x;
    }
}

// gate = act(gate) * up
inline void gate_up(Activation kind, float* gate, const float* up, int64_t n) {
    if (kind != Activation::SILU) {
        for (int64_t i = 0; i < n; ++i) gate[i] = activate(kind, gate[i]) * up[i];
        return;
    }
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t some = std::min<int64_t>(n - i, LANES);
        const v16 x = load_some(gate + i, some), y = load_some(up + i, some);
        store_some(gate + i, x / (exp(-x) + 1.0f) * y, some);
    }
}

class FeedForward {
public:
    FeedForward(const FeedForwardArgs& args, Scratch& scratch)
        : a(args), tokens_(args.sequence_lengths, args.batch, args.tokens / args.batch, scratch), T(tokens_.count) {
        logits_ = scratch.take_rows(T, a.experts);
        routed_ = take_tokens(scratch, T * a.top_k, a.expert_width, a.down.reads_integers());
        shared_ = take_tokens(scratch, T, a.shared.gate.rows, a.shared.down.reads_integers());
        block_ = any_reads_integers(a.down, a.shared.down) ? LARGEST_INNER_BLOCK : INNER_BLOCK;
    }

    void run(Team& team) const {
        Scratch& own = own_scratch();
        const bool narrow = any_reads_integers(a.gate, a.up, a.shared.gate, a.shared.up);
        float** x = take_tokens(own, T, a.hidden, narrow);
        for (int64_t t = 0; t < T; ++t) rms_norm(a.x + tokens_.rows[t] * a.hidden, a.norm, a.eps, a.hidden, x[t]);
        if (narrow) fix_all(x, T, a.hidden);
        copy_padding(tokens_, team, a.tokens, a.hidden, a.x, a.y);
        Chosen chosen;
        if (a.experts) {
            score(team, x);
            team.barrier();
            chosen = choose(own);
            if (team.thread == 0) count(chosen);
        }
        inner(team, x, chosen, own);
        team.barrier();
        outer(team, chosen, own);
    }

private:
    // The experts that some token chose, ascending, and the tokens of each with their weights.
    struct Chosen {
        std::vector<int64_t> experts, start;  // start of each expert's tokens; one more at the end
        std::vector<int64_t> tokens;
        std::vector<float> weights;
    };

    void score(Team& team, float** x) const {
        std::vector<float*> at(T);
        team.share(0, (a.experts + 7) / 8, [&](int64_t item) {
            const int64_t from = item * 8, to = std::min(from + 8, a.experts);
            for (int64_t t = 0; t < T; ++t) at[t] = logits_[t] + from;
            rows_times(a.router, from, to, x, T, at.data());
        });
    }

    Chosen choose(Scratch& own) const {
        int64_t* ids = own.take<int64_t>(T * a.top_k + a.groups);
        float* weights = own.take(T * a.top_k + a.groups);
        float *scores = own.take(a.experts), *work = own.take(a.experts);
        for (int64_t t = 0; t < T; ++t) route(a, logits_[t], scores, work, ids + t * a.top_k, weights + t * a.top_k);
        int64_t* counts = own.take<int64_t>(a.experts);
        std::fill(counts, counts + a.experts, 0);
        const int64_t pairs = T * a.top_k;
        for (int64_t i = 0; i < pairs; ++i) ++counts[ids[i]];
        Chosen chosen;
        chosen.tokens.resize(pairs);
        chosen.weights.resize(pairs);
        int64_t start = 0;
        for (int64_t e = 0; e < a.experts; ++e) {
            if (counts[e] == 0) continue;
            chosen.experts.push_back(e);
            chosen.start.push_back(start);
            start += counts[e];
            counts[e] = start - counts[e];  // now where its next token goes
        }
        chosen.start.push_back(start);
        for (int64_t i = 0; i < pairs; ++i) {
            const int64_t at = counts[ids[i]]++;
            chosen.tokens[at] = i / a.top_k;
            chosen.weights[at] = weights[i];
        }
        return chosen;
    }

    void count(const Chosen& chosen) const {
        a.hit->layers.fetch_add(1, std::memory_order_relaxed);
        a.hit->experts.fetch_add(static_cast<int64_t>(chosen.experts.size()), std::memory_order_relaxed);
    }

    // act(gate(x)) * up(x) of every chosen expert and of the shared ones.
    void inner(Team& team, float** x, const Chosen& chosen, Scratch& own) const {
        const int64_t blocks = (a.expert_width + block_ - 1) / block_;
        const int64_t routed = static_cast<int64_t>(chosen.experts.size()) * blocks;
        const int64_t shared = (a.shared.gate.rows + block_ - 1) / block_;
        float** up = own.take_rows(T, block_);
        const float** some = own.take<const float*>(T);
        float** to = own.take<float*>(T);
        team.share(1, routed + shared, [&](int64_t item) {
            if (item >= routed) {
                const int64_t from = (item - routed) * block_;
                for (int64_t t = 0; t < T; ++t) to[t] = shared_[t] + from;
                const int64_t last = std::min(from + block_, a.shared.gate.rows);
                return inner_block(a.shared, 0, from, last, x, T, to, up);
            }
            const int64_t i = item / blocks, from = item % blocks * block_, start = chosen.start[i];
            const int64_t count = chosen.start[i + 1] - start;
            for (int64_t t = 0; t < count; ++t) {
                some[t] = x[chosen.tokens[start + t]];
                to[t] = routed_[start + t] + from;
            }
            const Mlp experts{a.gate, a.up, a.down, {}, {}, {}};
            const int64_t last = std::min(from + block_, a.expert_width);
            inner_block(experts, chosen.experts[i] * a.expert_width, from, last, some, count, to, up);
        });
    }

    void inner_block(const Mlp& m, int64_t base, int64_t from, int64_t last, const float* const* x, int64_t tokens,
        float** gate, float** up) const {
        rows_times(m.gate, base + from, base + last, x, tokens, gate);
        add_bias(m.gate_bias, from, last, tokens, gate);
        rows_times(m.up, base + from, base + last, x, tokens, up);
        add_bias(m.up_bias, from, last, tokens, up);
        for (int64_t t = 0; t < tokens; ++t) gate_up(a.activation, gate[t], up[t], last - from);
        if (!m.down.reads_integers()) return;
        for (int64_t t = 0; t < tokens; ++t) {
            fix_group(gate[t] - from, m.down.columns, from / GROUP);
            if (last == m.down.columns) fix_rest(gate[t] - from, m.down.columns);
        }
    }

    // The down projections, weighted and summed in the order of expert ids, then the shared ones, then the residual.
    void outer(Team& team, const Chosen& chosen, Scratch& own) const {
        float** total = own.take_rows(T, OUTER_BLOCK);
        float** part = own.take_rows(T, OUTER_BLOCK);
        team.share(2, (a.hidden + OUTER_BLOCK - 1) / OUTER_BLOCK, [&](int64_t item) {
            const int64_t from = item * OUTER_BLOCK, last = std::min(from + OUTER_BLOCK, a.hidden);
            for (int64_t t = 0; t < T; ++t) std::fill(total[t], total[t] + OUTER_BLOCK, 0.0f);
            for (size_t i = 0; i < chosen.experts.size(); ++i) {
                const int64_t start = chosen.start[i], count = chosen.start[i + 1] - start;
                const int64_t base = chosen.experts[i] * a.hidden;
                rows_times(a.down, base + from, base + last, routed_ + start, count, part);
                for (int64_t t = 0; t < count; ++t) {
                    float* sum = total[chosen.tokens[start + t]];
                    const float weight = chosen.weights[start + t];
                    for (int64_t r = 0; r < last - from; ++r) sum[r] = std::fma(part[t][r], weight, sum[r]);
                }
            }
            if (a.shared.down.data) {
                rows_times(a.shared.down, from, last, shared_, T, part);
                add_bias(a.shared.down_bias, from, last, T, part);
                for (int64_t t = 0; t < T; ++t)
                    for (int64_t r = 0; r < last - from; ++r) total[t][r] += part[t][r];
            }
            for (int64_t t = 0; t < T; ++t)
                for (int64_t r = from, row = tokens_.rows[t] * a.hidden; r < last; ++r)
                    a.y[row + r] = a.x[row + r] + total[t][r - from];
        });
    }

    const FeedForwardArgs& a;
    const Tokens tokens_;
    const int64_t T;  // real ones
    float **logits_, **routed_, **shared_;
    int64_t block_;
};

}  // namespace ISA
