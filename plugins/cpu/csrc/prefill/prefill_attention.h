// The attention half of a decoder layer for many new tokens a sequence.
//
// A sequence's cached latents are taken in blocks, in which all its queries attend with a running softmax: expanded to
// keys and values of each head, or absorbed (queries brought to the latents), whichever takes fewer operations. That
// and the blocks depend on the sequence alone, so that results do, too.
#pragma once

#include "attention.h"
#include "blocks.h"

namespace ISA {

constexpr int64_t KEYS = 256;               // cached tokens of a block
constexpr int64_t QUERIES = 8 * TILE_ROWS;  // that a thread takes through a block at a time

// A block of one sequence's latents in float32: row by row, and their rank and rope parts as panels of keys.
struct Latents {
    int64_t first = 0, count = 0;
    float **rows, *panels;
};

// One query's share of a block: products with `live` of its keys become weights (the others' are zero), and what it has
// summed so far is brought to the new maximum.
inline void weigh_block(float* scores, int64_t live, int64_t panels, float scale, float& most, float& weights,
    float* out, int64_t width, bool is_first) {
    const i16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16 top = all(-INFINITY);
    for (int64_t c = 0; c < panels * LANES; c += LANES) {
        v16 x = load(scores + c) * scale;
        if (c + LANES > live) x = lanes < static_cast<int32_t>(std::max<int64_t>(live - c, 0)) ? x : all(-INFINITY);
        top = __builtin_elementwise_max(top, x);
        store(scores + c, x);
    }
    float now = most;
    for (int i = 0; i < LANES; ++i) now = std::max(now, top[i]);
    v16 total{};
    for (int64_t c = 0; c < panels * LANES; c += LANES) {
        const v16 weight = exp(load(scores + c) - now);
        total += weight;
        store(scores + c, weight);
    }
    const float kept = std::exp(most - now);
    weights = std::fma(weights, kept, sum(total));
    if (!is_first && now > most)
        for (int64_t i = 0; i < width; i += LANES) store(out + i, load(out + i) * kept);
    most = now;
}

class PrefillAttention {
public:
    PrefillAttention(const AttentionArgs& args, Scratch& scratch)
        : a(args), tokens_(args.sequence_lengths, args.batch, args.sequence, scratch) {
        D = a.kv_a.rows, R = D - a.rank, H = a.heads;
        const int64_t count = tokens_.count;
        first_ = any_reads_integers(a.q_a.data ? a.q_a : a.q, a.kv_a), second_ = a.q_a.data && a.q.reads_integers();
        x_ = take_padded(scratch, count, a.hidden, first_);
        compressed_ = take_padded(scratch, count, a.q_a.data ? a.q_a.rows : 0, second_);
        query_ = take_padded(scratch, count, a.q.rows);
        latent_ = take_padded(scratch, count, D);
        value_ = take_padded(scratch, count, H * a.value, a.o.reads_integers());
        int64_t absorbed = 0, expands = 0, most = 0;
        for (int64_t b = 0; b < a.batch; ++b) {
            most = std::max(most, tokens_.length(b) * H);
            if (is_absorbed(b))
                absorbed = std::max(absorbed, tokens_.length(b) * H);
            else
                expands = 1;
        }
        absorbed_ = take_padded(scratch, absorbed, D);
        attended_ = take_padded(scratch, most, absorbed ? std::max(a.rank, a.value) : a.value);
        keys_ = scratch.take(expands * H * a.nope * padded(KEYS));
        values_ = take_padded(scratch, expands * H * KEYS, a.value);
        most_ = scratch.take(most);
        sums_ = scratch.take(most);
        for (Latents& block : blocks_) {
            block.rows = take_padded(scratch, KEYS, D);
            block.panels = scratch.take(KEYS * D);
        }
    }

    void run(Team& team) const {
        Scratch& own = own_scratch();
        copy_padding(tokens_, team, a.batch * a.sequence, a.hidden, a.x, a.y);
        share_blocks(team, NORM, tokens_.count, TOGETHER, [&](int64_t from, int64_t last) {
            for (int64_t t = from; t < last; ++t)
                rms_norm(a.x + tokens_.rows[t] * a.hidden, a.norm, a.eps, a.hidden, x_[t]);
            if (first_) fix_all(x_ + from, last - from, a.hidden);
        });
        team.barrier();
        Work work(*this, own);
        project(team, work);
        team.barrier();
        finish(team, own);
        team.barrier();
        for (int64_t b = 0; b < a.batch; ++b)
            if (tokens_.length(b)) attend(team, b, work);
        if (a.o.reads_integers()) {
            share_blocks(team, FIX, tokens_.count, TOGETHER,
                [&](int64_t from, int64_t last) { fix_all(value_ + from, last - from, a.o.columns); });
            team.barrier();
        }
        output(team, work);
    }

private:
    enum Phase { NORM, FIRST, NORM_Q, SECOND, FINISH, GATHER, EXPAND, ATTEND, FIX, LAST };

    // What one thread needs.
    struct Work {
        float *packed, **part, **to, **scores, **weights;

        Work(const PrefillAttention& half, Scratch& own) {
            const int64_t most = std::max<int64_t>(std::min(TOKENS_AT_ONCE, half.tokens_.count), 1);
            packed = take_panels(own);
            part = take_padded(own, most, ROW_BLOCK);
            to = own.take<float*>(std::max({most, KEYS, half.a.nope}));
            scores = take_padded(own, QUERIES, KEYS);
            weights = take_padded(own, half.a.nope, std::max(half.a.rank, K_BLOCK));
        }
    };

    int64_t past(int64_t b) const { return a.past_lengths[b]; }
    int64_t length(int64_t b) const { return past(b) + tokens_.length(b); }

    // Whether to multiply each query by W_UK and each sum by W_UV takes fewer operations than each cached token.
    bool is_absorbed(int64_t b) const {
        const double queries = static_cast<double>(tokens_.length(b)), keys = static_cast<double>(length(b));
        const double pairs = queries * (keys - (queries - 1) / 2),
                     projection = static_cast<double>((a.nope + a.value) * a.rank);
        const double absorbed = queries * projection + pairs * static_cast<double>(2 * a.rank + R);
        return absorbed < keys * projection + pairs * static_cast<double>(a.nope + a.value + R);
    }

    // Products of all tokens with one or two matrices, shared out in blocks of outputs and tokens.
    void products(Team& team, int phase, float** x, const Matrix& m, const Matrix& bias, float** y, const Matrix& m2,
        const Matrix& bias2, float** y2, Work& work) const {
        const int64_t block = rows_a_block(team, m.rows + m2.rows);
        const int64_t blocks = (m.rows + block - 1) / block, more = (m2.rows + block - 1) / block;
        share_parts(team, phase, blocks + more, [&](int64_t item, int64_t first, int64_t count) {
            const bool second = item >= blocks;
            const Matrix& w = second ? m2 : m;
            const int64_t from = (second ? item - blocks : item) * block, last = std::min(from + block, w.rows);
            for (int64_t t = 0; t < count; ++t) work.to[t] = (second ? y2 : y)[first + t] + from;
            gemm(w, from, last, x + first, count, work.to, work.packed);
            add_bias(second ? bias2 : bias, from, last, count, work.to);
        });
    }

    // Calls body(item, first token, tokens) for items 0..items-1 and all tokens, some at a time.
    template <class Body>
    void share_parts(Team& team, int phase, int64_t items, Body body) const {
        const int64_t parts = (tokens_.count + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
        team.share(phase, items * parts, [&](int64_t i) {
            const int64_t first = i % parts * TOKENS_AT_ONCE;
            body(i / parts, first, std::min(TOKENS_AT_ONCE, tokens_.count - first));
        });
    }

    void project(Team& team, Work& work) const {
        const bool direct = a.q_a.data == nullptr;
        products(team, FIRST, x_, direct ? a.q : a.q_a, a.q_a_bias, direct ? query_ : compressed_, a.kv_a, a.kv_a_bias,
            latent_, work);
        if (direct) return;
        team.barrier();
        share_blocks(team, NORM_Q, tokens_.count, TOGETHER, [&](int64_t from, int64_t last) {
            for (int64_t t = from; t < last; ++t)
                rms_norm(compressed_[t], a.q_norm, a.latent_eps, a.q_a.rows, compressed_[t]);
            if (second_) fix_all(compressed_ + from, last - from, a.q_a.rows);
        });
        team.barrier();
        products(team, SECOND, compressed_, a.q, Matrix{}, query_, Matrix{}, Matrix{}, nullptr, work);
    }

    // The new latents go to their pages, and the queries' rope parts are rotated.
    void finish(Team& team, Scratch& own) const {
        float* c = own.take(std::max(a.rank, R));
        share_blocks(team, FINISH, tokens_.count, TOGETHER, [&](int64_t from, int64_t last) {
            int64_t b = 0;
            for (int64_t t = from; t < last; ++t) {
                while (tokens_.begin[b + 1] <= t) ++b;
                const float *cos = a.cos + tokens_.rows[t] * (R / 2), *sin = a.sin + tokens_.rows[t] * (R / 2);
                write_latent(b, t, cos, sin, c);
                for (int64_t h = 0; h < H; ++h) {
                    float* q = query_[t] + h * (a.nope + R) + a.nope;
                    rotate(q, cos, sin, R, c);
                    std::copy(c, c + R, q);
                }
            }
        });
    }

    void write_latent(int64_t b, int64_t t, const float* cos, const float* sin, float* c) const {
        rms_norm(latent_[t], a.kv_norm, a.latent_eps, a.rank, c);
        const int64_t slot = slot_of(b, past(b) + t - tokens_.begin[b]);
        if (a.cache != CacheFormat::WHOLE) return write_narrow(a, c, latent_[t] + a.rank, cos, sin, slot);
        with_type(a.pool, a.pool_type, [&](auto* pool) {
            auto* row = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(pool)>>*>(pool) + slot * D;
            for (int64_t i = 0; i < a.rank; ++i) put(row + i, c[i]);
            rotate(latent_[t] + a.rank, cos, sin, R, row + a.rank);
        });
    }

    int64_t slot_of(int64_t b, int64_t t) const {
        const int64_t page = a.page_table[b * a.table_width + std::min(t / a.page, a.table_width - 1)];
        return page * a.page + t % a.page;
    }

    // One sequence: block after block, of which the next is gathered meanwhile.
    void attend(Team& team, int64_t b, Work& work) const {
        const bool absorbed = is_absorbed(b);
        const int64_t panels = (std::min(KEYS, length(b)) + LANES - 1) / LANES;
        team.share(GATHER, panels + (absorbed ? H : 0), [&](int64_t item) {
            if (item < panels)
                gather(b, 0, item);
            else
                absorb(b, item - panels, work);
        });
        team.restart(EXPAND);
        team.barrier();
        for (int64_t first = 0; first < length(b); first += KEYS) {
            const Latents block = latents_of(b, first);
            if (!absorbed) team.share(EXPAND, 2 * H, [&](int64_t item) { expand(block, item / 2, item % 2, work); });
            team.restart(ATTEND);
            team.barrier();
            attend_block(team, b, absorbed, block, work);
            team.restart(EXPAND);
            team.restart(GATHER);
            team.barrier();
        }
        if (!absorbed) return;
        team.share(EXPAND, H, [&](int64_t h) { bring_back(b, h, work); });
        team.barrier();
    }

    Latents latents_of(int64_t b, int64_t first) const {
        Latents block = blocks_[first / KEYS % 2];
        block.first = first, block.count = std::min(KEYS, length(b) - first);
        return block;
    }

    // Sixteen cached tokens of a block; those that fill up the last panel are zero.
    void gather(int64_t b, int64_t first, int64_t panel) const {
        const Latents block = latents_of(b, first);
        const int64_t from = panel * LANES;
        for (int64_t i = from; i < from + LANES; ++i) {
            if (i >= block.count) {
                std::memset(block.rows[i], 0, D * sizeof(float));
                continue;
            }
            if (a.cache != CacheFormat::WHOLE) {
                read_narrow(a, slot_of(b, first + i), block.rows[i]);
                continue;
            }
            with_type(a.pool, a.pool_type, [&](auto* pool) {
                const auto* latent = pool + slot_of(b, first + i) * D;
                int64_t d = 0;
                for (; d + LANES <= D; d += LANES) store(block.rows[i] + d, load(latent + d));
                for (; d < D; ++d) block.rows[i][d] = one(latent + d);
            });
        }
        pack_panel<float>(block.rows + from, D, block.panels + from * D);
    }

    Panels panels_of_keys(const Latents& block, int64_t d) const {
        return {block.panels + d * LANES, LANES * D, LANES};
    }

    // Keys without rope [N, keys] of a head, or its values [keys, V].
    void expand(const Latents& block, int64_t h, bool is_value, Work& work) const {
        const int64_t panels = (block.count + LANES - 1) / LANES;
        if (is_value) {
            for (int64_t v = 0; v < a.value; v += ROW_BLOCK) {
                for (int64_t i = 0; i < block.count; ++i) work.to[i] = values_[h * KEYS + i] + v;
                const int64_t first = h * a.value + v, last = h * a.value + std::min(v + ROW_BLOCK, a.value);
                gemm(a.w_uv, first, last, block.rows, block.count, work.to, work.packed);
            }
            return;
        }
        for (int64_t n = 0; n < a.nope; ++n) work.to[n] = keys_ + (h * a.nope + n) * padded(KEYS);
        for (int64_t k = 0; k < a.rank; k += K_BLOCK) {
            const int64_t depth = std::min(K_BLOCK, a.rank - k);
            read_weights(a.w_uk, h * a.nope, k, depth, work.weights);
            times_panels(work.weights, 0, a.nope, panels_of_keys(block, k), panels, depth, k == 0, work.to);
        }
    }

    // Columns from..from + depth of the N rows of W_UK from row `first` on, in float32.
    void read_weights(const Matrix& m, int64_t first, int64_t from, int64_t depth, float** to) const {
        with_type(m.data, m.type, [&](auto* data) {
            for (int64_t n = 0; n < a.nope; ++n) {
                const auto* row = data + (first + n) * m.columns + from;
                int64_t k = 0;
                for (; k + LANES <= depth; k += LANES) store(to[n] + k, load(row + k));
                for (; k < depth; ++k) to[n][k] = one(row + k);
            }
        });
    }

    // A head's queries multiplied by W_UK, beside their rope parts.
    void absorb(int64_t b, int64_t h, Work& work) const {
        const int64_t first = tokens_.begin[b], count = tokens_.length(b), width = a.nope + R;
        read_weights(a.w_uk, h * a.nope, 0, a.rank, work.weights);
        const Panels w{work.weights[0], LANES, padded(std::max(a.rank, K_BLOCK))};
        for (int64_t t = 0; t < count; t += TOKENS_AT_ONCE) {
            const int64_t some = std::min(TOKENS_AT_ONCE, count - t);
            for (int64_t i = 0; i < some; ++i) work.to[i] = absorbed_[(t + i) * H + h];
            std::vector<const float*> q(some);
            for (int64_t i = 0; i < some; ++i) q[i] = query_[first + t + i] + h * width;
            times_panels(q.data(), 0, some, w, (a.rank + LANES - 1) / LANES, a.nope, true, work.to);
            for (int64_t i = 0; i < some; ++i) std::copy(q[i] + a.nope, q[i] + width, work.to[i] + a.rank);
        }
    }

    // All tiles of queries that see something of the block, and the next block's latents.
    void attend_block(Team& team, int64_t b, bool absorbed, const Latents& block, Work& work) const {
        const int64_t next = block.first + KEYS, left = length(b) - next;
        const int64_t panels = left > 0 ? (std::min(KEYS, left) + LANES - 1) / LANES : 0;
        const int64_t rows = tokens_.length(b) * (absorbed ? H : 1), heads = absorbed ? 1 : H;
        const int64_t tiles = (rows + QUERIES - 1) / QUERIES;
        team.share(ATTEND, panels + heads * tiles, [&](int64_t item) {
            if (item < panels) return gather(b, next, item);
            const int64_t h = (item - panels) / tiles, from = (item - panels) % tiles * QUERIES;
            attend_tile(b, absorbed, block, h, from, std::min(QUERIES, rows - from), work);
        });
    }

    // Some rows (a query of a head each) of one sequence, and what they see of a block.
    void attend_tile(
        int64_t b, bool absorbed, const Latents& block, int64_t h, int64_t from, int64_t count, Work& work) const {
        const int64_t each = absorbed ? H : 1;  // rows at one position
        auto position = [&](int64_t i) { return past(b) + (from + i) / each; };
        const int64_t depth = std::min(block.count, position(count - 1) + 1 - block.first);
        if (depth <= 0) return;
        const int64_t panels = (depth + LANES - 1) / LANES, width = absorbed ? a.rank : a.value;
        const bool is_first = block.first == 0;
        const int64_t row = (absorbed ? 0 : h * tokens_.length(b)) + from;
        float** out = attended_ + row;
        if (absorbed) {
            times_panels(absorbed_ + row, 0, count, panels_of_keys(block, 0), panels, D, true, work.scores);
        } else {
            const float* q[QUERIES];
            for (int64_t i = 0; i < count; ++i) q[i] = query_[tokens_.begin[b] + from + i] + h * (a.nope + R);
            const Panels keys{keys_ + h * a.nope * padded(KEYS), LANES, padded(KEYS)};
            times_panels(q, 0, count, keys, panels, a.nope, true, work.scores);
            times_panels(q, a.nope, count, panels_of_keys(block, a.rank), panels, R, false, work.scores);
        }
        for (int64_t i = 0; i < count; ++i) {
            if (is_first) most_[row + i] = -INFINITY, sums_[row + i] = 0.0f;
            weigh_block(work.scores[i], position(i) + 1 - block.first, panels, a.scale, most_[row + i], sums_[row + i],
                out[i], width, is_first);
        }
        const Panels values{absorbed ? block.rows[0] : values_[h * KEYS], LANES, padded(absorbed ? D : a.value)};
        times_panels(work.scores, 0, count, values, (width + LANES - 1) / LANES, depth, is_first, out);
        for (int64_t i = 0; i < count; ++i)
            if (position(i) / KEYS == block.first / KEYS) {  // it has seen all
                const float share = 1.0f / sums_[row + i];
                float* to = absorbed ? out[i] : value_[tokens_.begin[b] + from + i] + h * a.value;
                for (int64_t v = 0; v < width; ++v) to[v] = out[i][v] * share;
            }
    }

    // An absorbed sequence's sums of latents become a head's values.
    void bring_back(int64_t b, int64_t h, Work& work) const {
        const int64_t first = tokens_.begin[b], count = tokens_.length(b);
        for (int64_t t = 0; t < count; t += TOKENS_AT_ONCE) {
            const int64_t some = std::min(TOKENS_AT_ONCE, count - t);
            for (int64_t i = 0; i < some; ++i) work.to[i] = attended_[(t + i) * H + h];
            for (int64_t v = 0; v < a.value; v += ROW_BLOCK) {
                const int64_t last = std::min(v + ROW_BLOCK, a.value);
                gemm(a.w_uv, h * a.value + v, h * a.value + last, work.to, some, work.part, work.packed);
                for (int64_t i = 0; i < some; ++i)
                    std::copy(work.part[i], work.part[i] + last - v, value_[first + t + i] + h * a.value + v);
            }
        }
    }

    void output(Team& team, Work& work) const {
        const int64_t block = rows_a_block(team, a.hidden);
        share_parts(team, LAST, (a.hidden + block - 1) / block, [&](int64_t item, int64_t first, int64_t count) {
            const int64_t from = item * block, last = std::min(from + block, a.hidden);
            gemm(a.o, from, last, value_ + first, count, work.part, work.packed);
            add_bias(a.o_bias, from, last, count, work.part);
            for (int64_t t = 0; t < count; ++t) {
                const int64_t row = tokens_.rows[first + t] * a.hidden;
                for (int64_t i = from; i < last; ++i) a.y[row + i] = a.x[row + i] + work.part[t][i - from];
            }
        });
    }

    const AttentionArgs& a;
    const Tokens tokens_;
    int64_t D, R, H;
    bool first_, second_;  // whether x_ and compressed_ become integers
    float **x_, **compressed_, **query_, **latent_, **value_;
    float **absorbed_, **attended_;  // [queries * H, D] and [queries * H, L] of an absorbed sequence
    float *keys_, **values_;         // [H * N, KEYS] and [H * KEYS, V] of a block
    float *most_, *sums_;            // [queries * H] of a sequence
    Latents blocks_[2];
};

}  // namespace ISA
