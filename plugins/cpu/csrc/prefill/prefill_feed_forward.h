// The other half of a decoder layer for many tokens: those of an expert together, with blocks of its weights.
#pragma once

#include "blocks.h"
#include "feed_forward.h"

namespace ISA {

class PrefillFeedForward {
public:
    PrefillFeedForward(const FeedForwardArgs& args, Scratch& scratch)
        : a(args), tokens_(args.sequence_lengths, args.batch, args.tokens / args.batch, scratch) {
        narrow_ = any_reads_integers(a.gate, a.up, a.shared.gate, a.shared.up);
        x_ = take_padded(scratch, tokens_.count, a.hidden, narrow_);
        ids_ = scratch.take<int64_t>(tokens_.count * a.top_k);
        weights_ = scratch.take(tokens_.count * a.top_k);
        routed_ = take_padded(scratch, tokens_.count * a.top_k, a.expert_width, a.down.reads_integers());
        shared_ = take_padded(scratch, tokens_.count, a.shared.gate.rows, a.shared.down.reads_integers());
    }

    void run(Team& team) const {
        Scratch& own = own_scratch();
        copy_padding(tokens_, team, a.tokens, a.hidden, a.x, a.y);
        share_blocks(team, 0, tokens_.count, TOGETHER, [&](int64_t from, int64_t last) {
            for (int64_t t = from; t < last; ++t)
                rms_norm(a.x + tokens_.rows[t] * a.hidden, a.norm, a.eps, a.hidden, x_[t]);
            if (narrow_) fix_all(x_ + from, last - from, a.hidden);
        });
        team.barrier();
        Work work(*this, own);
        if (a.experts) {
            route_all(team, work, own);
            team.barrier();
        }
        const Chosen chosen = sort(own);
        inner(team, chosen, work);
        team.barrier();
        if (any_reads_integers(a.down, a.shared.down)) {
            fix_inner(team, chosen);
            team.barrier();
        }
        outer(team, chosen, work);
    }

private:
    // Tokens by the expert that they go to, ascending, each expert's in their order.
    struct Chosen {
        int64_t *start, *pairs;  // [E + 1] and [T * K]: a pair is token * K + rank
    };
    // What one thread needs for a block of tokens.
    struct Work {
        float *packed, **part, **to;
        const float** from;

        Work(const PrefillFeedForward& half, Scratch& own) {
            const int64_t most = std::min(TOKENS_AT_ONCE, std::max<int64_t>(half.tokens_.count, 1));
            packed = take_panels(own);
            part = take_padded(own, most, ROW_BLOCK);
            to = own.take<float*>(most);
            from = own.take<const float*>(most);
        }
    };
    // A block of outputs for some tokens of an expert, or for some of all tokens: those of the shared experts.
    struct Item {
        int64_t expert, row, last, token, count;  // expert -1: shared
    };

    void route_all(Team& team, Work& work, Scratch& own) const {
        constexpr int64_t some = 4 * TILE_ROWS;
        float** logits = take_padded(own, some, (a.experts + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK);
        int64_t* ids = own.take<int64_t>(a.top_k + a.groups);
        float* weights = own.take(a.top_k + a.groups);
        float *scores = own.take(a.experts), *room = own.take(a.experts);
        share_blocks(team, 1, tokens_.count, some, [&](int64_t from, int64_t last) {
            for (int64_t r = 0; r < a.experts; r += ROW_BLOCK) {
                for (int64_t t = 0; t < last - from; ++t) work.to[t] = logits[t] + r;
                gemm(a.router, r, std::min(r + ROW_BLOCK, a.experts), x_ + from, last - from, work.to, work.packed);
            }
            for (int64_t t = from; t < last; ++t) {
                route(a, logits[t - from], scores, room, ids, weights);
                std::copy(ids, ids + a.top_k, ids_ + t * a.top_k);
                std::copy(weights, weights + a.top_k, weights_ + t * a.top_k);
            }
        });
    }

    Chosen sort(Scratch& own) const {
        const int64_t pairs = a.experts ? tokens_.count * a.top_k : 0;
        Chosen chosen{own.take<int64_t>(a.experts + 1), own.take<int64_t>(pairs)};
        int64_t* next = own.take<int64_t>(a.experts + 1);
        std::fill(next, next + a.experts + 1, 0);
        for (int64_t i = 0; i < pairs; ++i) ++next[ids_[i] + 1];
        for (int64_t e = 0; e < a.experts; ++e) next[e + 1] += next[e];
        std::copy(next, next + a.experts + 1, chosen.start);
        for (int64_t i = 0; i < pairs; ++i) chosen.pairs[next[ids_[i]]++] = i;
        return chosen;
    }

    // act(gate(x)) * up(x) of the shared experts and of every chosen one.
    void inner(Team& team, const Chosen& chosen, Work& work) const {
        std::vector<Item> items;
        if (a.shared.gate.data) add_items(team, -1, a.shared.gate.rows, 0, tokens_.count, items);
        for (int64_t e = 0; e < a.experts; ++e)
            add_items(team, e, a.expert_width, chosen.start[e], chosen.start[e + 1], items);
        const Mlp experts{a.gate, a.up, a.down, {}, {}, {}};
        team.share(2, static_cast<int64_t>(items.size()), [&](int64_t i) {
            const Item& item = items[i];
            const bool routed = item.expert >= 0;
            for (int64_t t = 0; t < item.count; ++t) {
                work.from[t] = x_[routed ? chosen.pairs[item.token + t] / a.top_k : item.token + t];
                work.to[t] = (routed ? routed_ : shared_)[item.token + t] + item.row;
            }
            inner_block(routed ? experts : a.shared, routed ? item.expert * a.expert_width : 0, item, work);
        });
    }

    void add_items(
        const Team& team, int64_t expert, int64_t rows, int64_t first, int64_t last, std::vector<Item>& items) const {
        const int64_t block = rows_a_block(team, rows * (expert < 0 ? 1 : a.experts));
        for (int64_t t = first; t < last; t += TOKENS_AT_ONCE)
            for (int64_t r = 0; r < rows; r += block)
                items.push_back({expert, r, std::min(r + block, rows), t, std::min(TOKENS_AT_ONCE, last - t)});
    }

    void inner_block(const Mlp& m, int64_t base, const Item& item, Work& work) const {
        const int64_t width = item.last - item.row;
        gemm(m.gate, base + item.row, base + item.last, work.from, item.count, work.to, work.packed);
        add_bias(m.gate_bias, item.row, item.last, item.count, work.to);
        gemm(m.up, base + item.row, base + item.last, work.from, item.count, work.part, work.packed);
        add_bias(m.up_bias, item.row, item.last, item.count, work.part);
        for (int64_t t = 0; t < item.count; ++t) gate_up(a.activation, work.to[t], work.part[t], width);
    }

    // What down projections of whole numbers read becomes integers.
    void fix_inner(Team& team, const Chosen& chosen) const {
        const int64_t pairs = a.down.reads_integers() ? chosen.start[a.experts] : 0;
        const int64_t tokens = a.shared.down.reads_integers() ? tokens_.count : 0;
        share_blocks(team, 4, pairs, TOGETHER,
            [&](int64_t from, int64_t last) { fix_all(routed_ + from, last - from, a.down.columns); });
        share_blocks(team, 5, tokens, TOGETHER,
            [&](int64_t from, int64_t last) { fix_all(shared_ + from, last - from, a.shared.down.columns); });
    }

    // The down projections, weighted and summed in the order of expert ids, then the shared ones, then the residual.
    void outer(Team& team, const Chosen& chosen, Work& work) const {
        share_blocks(team, 3, a.hidden, rows_a_block(team, a.hidden), [&](int64_t from, int64_t last) {
            for (int64_t t = 0; t < tokens_.count; ++t) std::memset(y(t) + from, 0, (last - from) * sizeof(float));
            for (int64_t e = 0; e < a.experts; ++e)
                each_part(a.down, e * a.hidden, from, last, routed_, chosen.start[e], chosen.start[e + 1], work,
                    [&](int64_t i, float* part) {
                        const int64_t pair = chosen.pairs[i];
                        add_scaled(part, weights_[pair], last - from, y(pair / a.top_k) + from);
                    });
            if (a.shared.down.data)
                each_part(a.shared.down, 0, from, last, shared_, 0, tokens_.count, work, [&](int64_t t, float* part) {
                    add_bias(a.shared.down_bias, from, last, 1, &part);
                    add_scaled(part, 1.0f, last - from, y(t) + from);
                });
            for (int64_t t = 0; t < tokens_.count; ++t)
                add_scaled(a.x + tokens_.rows[t] * a.hidden + from, 1.0f, last - from, y(t) + from);
        });
    }

    // Calls body(i, product) for the rows first..end of x, some at a time.
    template <class Body>
    void each_part(const Matrix& m, int64_t base, int64_t from, int64_t last, float** x, int64_t first, int64_t end,
        Work& work, Body body) const {
        for (int64_t t = first; t < end; t += TOKENS_AT_ONCE) {
            const int64_t count = std::min(TOKENS_AT_ONCE, end - t);
            gemm(m, base + from, base + last, x + t, count, work.part, work.packed);
            for (int64_t i = 0; i < count; ++i) body(t + i, work.part[i]);
        }
    }

    float* y(int64_t t) const { return a.y + tokens_.rows[t] * a.hidden; }

    const FeedForwardArgs& a;
    const Tokens tokens_;
    // What the phases hand on: normed tokens, where each goes and with which weight, and what the inner products give.
    float **x_, **routed_, **shared_;
    bool narrow_;  // whether x_ becomes integers
    int64_t* ids_;
    float* weights_;
};

}  // namespace ISA
