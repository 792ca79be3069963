// The attention half of a decoder layer for few new tokens a sequence, absorbed: from the residual stream to itself.
//
// Every token attends by itself to what lies before it: what comes out is what it would be if it had come alone.
#pragma once

#include <algorithm>

#include "latents.h"
#include "linear.h"
#include "scratch.h"
#include "tokens.h"

namespace ISA {

constexpr int64_t BLOCK = 32;  // weight rows that a thread takes at a time
#ifdef __AVX512F__
constexpr int64_t WIDEST_GROUP = 8;  // heads that read a latent together
#else
constexpr int64_t WIDEST_GROUP = 4;
#endif

constexpr int64_t LARGEST_CHUNK = 256;

// Cached tokens that one thread attends to at a time. Depends on the sequence alone, so that results do too.
inline int64_t chunk_of(int64_t length) { return length <= 1024 ? 64 : length <= 16384 ? 128 : LARGEST_CHUNK; }

// x rotated in adjacent pairs.
template <class X>
inline void rotate(const float* x, const float* cos, const float* sin, int64_t width, X* y) {
    for (int64_t i = 0; i < width / 2; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        put(y + 2 * i, even * cos[i] - odd * sin[i]);
        put(y + 2 * i + 1, even * sin[i] + odd * cos[i]);
    }
}

// total[h][l] (+)= sum over tokens of p[token][h] latents[token][l], for H heads and 16 C columns.
// Meanwhile the latents at `next` are fetched, which are needed after these.
template <int H, int C, class P>
INLINE void weigh(const P* latents, int64_t stride, int64_t tokens, const float* p, int64_t ldp, bool first,
    float* total, int64_t ldt, const P* next) {
    v16 sums[H][C];
    for (int h = 0; h < H; ++h)
        for (int c = 0; c < C; ++c) sums[h][c] = first ? v16{} : load(total + h * ldt + c * LANES);
    for (int64_t t = 0; t < tokens; ++t) {
        v16 row[C];
        for (int c = 0; c < C; ++c) {
            row[c] = load(latents + t * stride + c * LANES);
            __builtin_prefetch(next + t * stride + c * LANES, 0, 2);
        }
        for (int h = 0; h < H; ++h)
            for (int c = 0; c < C; ++c) sums[h][c] = fma(all(p[t * ldp + h]), row[c], sums[h][c]);
    }
    for (int h = 0; h < H; ++h)
        for (int c = 0; c < C; ++c) store(total + h * ldt + c * LANES, sums[h][c]);
}

template <int H, class P>
INLINE void weigh_all(const P* latents, int64_t stride, int64_t rank, int64_t tokens, const float* p, int64_t ldp,
    bool first, float* total, int64_t ldt, const P* next) {
#ifdef __AVX512F__
    constexpr int WIDE = H == 8 ? 3 : 4;
#else
    constexpr int WIDE = 1;
#endif
    int64_t l = 0;
    for (; l + WIDE * LANES <= rank; l += WIDE * LANES)
        weigh<H, WIDE>(latents + l, stride, tokens, p, ldp, first, total + l, ldt, next + l);
    for (; l + LANES <= rank; l += LANES)
        weigh<H, 1>(latents + l, stride, tokens, p, ldp, first, total + l, ldt, next + l);
    for (; l < rank; ++l)
        for (int h = 0; h < H; ++h) {
            float sum = first ? 0.0f : total[h * ldt + l];
            for (int64_t t = 0; t < tokens; ++t) sum = std::fma(p[t * ldp + h], one(latents + t * stride + l), sum);
            total[h * ldt + l] = sum;
        }
}

// scores[token][h] = q[h] . latents[token]
template <int H, class P>
INLINE void score(const P* latents, int64_t stride, int64_t tokens, const float* q, float* scores, int64_t lds) {
#ifdef __AVX512F__
    constexpr int TOGETHER = H == 8 ? 3 : 4;
#else
    constexpr int TOGETHER = 1;
#endif
    const float* queries[H];
    float out[H][TOGETHER];
    float* outs[H];
    for (int h = 0; h < H; ++h) {
        queries[h] = q + h * stride;
        outs[h] = out[h];
    }
    int64_t t = 0;
    for (; t + TOGETHER <= tokens; t += TOGETHER) {
        dots<TOGETHER, H>(latents + t * stride, stride, queries, stride, outs, 0);
        for (int i = 0; i < TOGETHER; ++i)
            for (int h = 0; h < H; ++h) scores[(t + i) * lds + h] = out[h][i];
    }
    for (; t < tokens; ++t) {
        dots<1, H>(latents + t * stride, stride, queries, stride, outs, 0);
        for (int h = 0; h < H; ++h) scores[t * lds + h] = out[h][0];
    }
}

// Calls body(start, count) for the runs of neighbouring slots that hold tokens first..last of a sequence.
template <class Body>
inline void each_run(const AttentionArgs& a, int64_t row, int64_t first, int64_t last, Body body) {
    for (int64_t t = first; t < last;) {
        const int64_t slot = t % a.page, count = std::min(a.page - slot, last - t);
        const int64_t page = a.page_table[row * a.table_width + t / a.page];
        body(page * a.page + slot, t - first, count);
        t += count;
    }
}

// What H heads of one sequence see in one chunk: its maximum, sum and weighted latents a head. each_run(body) calls
// body(slot, at, count) for runs of neighbouring slots of the pool, which hold the chunk's tokens from `at` on.
template <int H, class P, class Runs>
inline void attend(const AttentionArgs& a, const P* pool, int64_t tokens, const Runs& each_run, const float* q,
    float* most, float* sums, float* total, float* scores, int64_t next) {
    const int64_t D = a.kv_a.rows;
    each_run(
        [&](int64_t slot, int64_t at, int64_t count) { score<H>(pool + slot * D, D, count, q, scores + at * H, H); });
    for (int h = 0; h < H; ++h) most[h] = -INFINITY;
    for (int64_t t = 0; t < tokens; ++t)
        for (int h = 0; h < H; ++h) most[h] = std::max(most[h], scores[t * H + h] *= a.scale);
    for (int64_t t = 0; t < tokens; ++t)
        for (int h = 0; h < H; ++h) scores[t * H + h] -= most[h];
    int64_t i = 0;
    for (; i + LANES <= tokens * H; i += LANES) store(scores + i, exp(load(scores + i)));
    if (i < tokens * H) store_some(scores + i, exp(load_some(scores + i, tokens * H - i)), tokens * H - i);
    for (int h = 0; h < H; ++h) sums[h] = 0.0f;
    for (int64_t t = 0; t < tokens; ++t)
        for (int h = 0; h < H; ++h) sums[h] += scores[t * H + h];
    each_run([&](int64_t slot, int64_t at, int64_t count) {
        const P* after = pool + (next < 0 ? slot : next + at) * D;
        weigh_all<H>(pool + slot * D, D, a.rank, count, scores + at * H, H, at == 0, total, a.rank, after);
    });
}

// A token's latent and rope part, rotated, to its slot of a narrow cache.
inline void write_narrow(
    const AttentionArgs& a, const float* latent, const float* rope, const float* cos, const float* sin, int64_t slot) {
    with_type(a.rest, a.pool_type, [&](auto* rest) {
        auto* row = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(rest)>>*>(rest) + slot * a.rest_width;
        write_codes(a, latent, slot, row);
        rotate(rope, cos, sin, a.rest_width - a.rank / a.group, row);
    });
}

class Attention {
public:
    Attention(const AttentionArgs& args, Scratch& scratch)
        : a(args), tokens_(args.sequence_lengths, args.batch, args.sequence, scratch), T(tokens_.count) {
        D = a.kv_a.rows;
        chunks_ = 1;
        for (int64_t t = 0; t < T; ++t) chunks_ = std::max(chunks_, chunks_of(t));
        first_ = any_reads_integers(a.q_a.data ? a.q_a : a.q, a.kv_a), second_ = a.q_a.data && a.q.reads_integers();
        compressed_ = scratch.take_rows(T, a.q_a.data ? a.q_a.rows : 0);
        query_ = scratch.take_rows(T, a.q.rows);
        latent_ = scratch.take_rows(T, D);
        absorbed_ = scratch.take_rows(T * a.heads, D);
        value_ = scratch.take_rows(T, a.heads * a.value);
        most_ = scratch.take(T * chunks_ * a.heads);
        sums_ = scratch.take(T * chunks_ * a.heads);
        totals_ = scratch.take(T * chunks_ * a.heads * a.rank);
    }

    void run(Team& team) const {
        Scratch& own = own_scratch();
        const int64_t widest = std::max(a.hidden, a.q_a.data ? a.q_a.rows : 0);
        float** x = take_tokens(own, T, widest, first_ || second_);
        for (int64_t t = 0; t < T; ++t) rms_norm(a.x + tokens_.rows[t] * a.hidden, a.norm, a.eps, a.hidden, x[t]);
        if (first_) fix_all(x, T, a.hidden);
        copy_padding(tokens_, team, a.tokens, a.hidden, a.x, a.y);
        project(team, x);
        team.barrier();
        absorb(team, own);
        team.barrier();
        attend_all(team, own);
        team.barrier();
        values(team, own);
        team.barrier();
        output(team, own);
    }

private:
    int64_t row(int64_t t) const { return tokens_.rows[t] / a.sequence; }
    // What the token sees, itself included.
    int64_t length(int64_t t) const { return a.past_lengths[row(t)] + tokens_.rows[t] % a.sequence + 1; }
    int64_t chunks_of(int64_t t) const {
        const int64_t chunk = chunk_of(length(t));
        return (length(t) + chunk - 1) / chunk;
    }
    const float* cos(int64_t t) const { return a.cos + tokens_.rows[t] * a.rope; }
    const float* sin(int64_t t) const { return a.sin + tokens_.rows[t] * a.rope; }

    // Rows of two matrices, of the same tokens, shared out in blocks.
    void project(Team& team, float** x) const {
        const Matrix& first = a.q_a.data ? a.q_a : a.q;
        float** to = a.q_a.data ? compressed_ : query_;
        products(team, 0, first, a.q_a_bias, &a.kv_a, &a.kv_a_bias, x, to, latent_);
        if (a.q_a.data == nullptr) return;
        team.barrier();
        for (int64_t t = 0; t < T; ++t) rms_norm(compressed_[t], a.q_norm, a.latent_eps, a.q_a.rows, x[t]);
        if (second_) fix_all(x, T, a.q_a.rows);
        products(team, 1, a.q, Matrix{}, nullptr, nullptr, x, query_, nullptr);
    }

    void products(Team& team, int phase, const Matrix& m, const Matrix& bias, const Matrix* m2, const Matrix* bias2,
        float** x, float** y, float** y2) const {
        const int64_t blocks = (m.rows + BLOCK - 1) / BLOCK, more = m2 ? (m2->rows + BLOCK - 1) / BLOCK : 0;
        std::vector<float*> at(T);
        team.share(phase, blocks + more, [&](int64_t item) {
            const bool second = item >= blocks;
            const Matrix& w = second ? *m2 : m;
            const int64_t from = (second ? item - blocks : item) * BLOCK, to = std::min(from + BLOCK, w.rows);
            for (int64_t t = 0; t < T; ++t) at[t] = (second ? y2 : y)[t] + from;
            rows_times(w, from, to, x, T, at.data());
            add_bias(second ? *bias2 : bias, from, to, T, at.data());
        });
    }

    // Each new token's latent goes to its page; each head's query is multiplied by W_UK and rotated.
    void absorb(Team& team, Scratch& own) const {
        const int64_t R = D - a.rank, width = a.nope + R;
        for (int64_t t = team.thread; t < T; t += team.count) write_latent(t, R, own);
        const int64_t parts = a.heads >= 2 * team.count ? 1 : 2 * team.count;
        const int64_t columns = (a.rank / LANES / parts + 1) * LANES;
        std::vector<const float*> q(T);
        std::vector<float*> to(T);
        team.share(2, a.heads * parts, [&](int64_t item) {
            const int64_t h = item / parts, first = std::min(item % parts * columns, a.rank);
            const int64_t last = parts == 1 ? a.rank : std::min(first + columns, a.rank);
            for (int64_t t = 0; t < T; ++t) {
                q[t] = query_[t] + h * width;
                to[t] = absorbed_[t * a.heads + h];
                if (first == 0) rotate(q[t] + a.nope, cos(t), sin(t), R, to[t] + a.rank);
            }
            with_type(a.w_uk.data, a.w_uk.type, [&](auto* w) {
                columns_times(w + h * a.nope * a.rank, a.nope, a.rank, first, last, q.data(), T, to.data());
            });
        });
    }

    void write_latent(int64_t t, int64_t R, Scratch& own) const {
        float* c = own.take(a.rank);
        rms_norm(latent_[t], a.kv_norm, a.latent_eps, a.rank, c);
        const int64_t slot = slot_of(t, length(t) - 1);
        if (a.cache != CacheFormat::WHOLE) return write_narrow(a, c, latent_[t] + a.rank, cos(t), sin(t), slot);
        with_type(a.pool, a.pool_type, [&](auto* pool) {
            auto* row = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(pool)>>*>(pool) + slot * D;
            for (int64_t i = 0; i < a.rank; ++i) put(row + i, c[i]);
            rotate(latent_[t] + a.rank, cos(t), sin(t), R, row + a.rank);
        });
    }

    void attend_all(Team& team, Scratch& own) const {
        float* scores = own.take(LARGEST_CHUNK * WIDEST_GROUP);
        const bool is_narrow = a.cache != CacheFormat::WHOLE;
        float* widened = own.take(is_narrow ? LARGEST_CHUNK * D : 0);
        const int64_t groups = (a.heads + WIDEST_GROUP - 1) / WIDEST_GROUP;
        team.share(3, T * chunks_ * groups, [&](int64_t item) {
            const int64_t group = item % groups, chunk = item / groups % chunks_, t = item / groups / chunks_;
            const int64_t size = chunk_of(length(t)), first = chunk * size;
            if (first >= length(t)) return;
            const int64_t last = std::min(first + size, length(t));
            if (is_narrow)
                each_run(a, row(t), first, last, [&](int64_t slot, int64_t at, int64_t count) {
                    for (int64_t i = 0; i < count; ++i) read_narrow(a, slot + i, widened + (at + i) * D);
                });
            for (int64_t h = group * WIDEST_GROUP, end = std::min(h + WIDEST_GROUP, a.heads); h < end;) {
                const int64_t at = (t * chunks_ + chunk) * a.heads + h;
                const int64_t next = slot_of(t, first + size * team.count);
                h += attend_group(t, first, last, h, end - h, at, scores, is_narrow ? -1 : next, widened);
            }
        });
    }

    // The place in the pool of what is cached at a position of the token's sequence; -1 beyond what it sees.
    int64_t slot_of(int64_t t, int64_t at) const {
        if (at >= length(t)) return -1;
        return a.page_table[row(t) * a.table_width + at / a.page] * a.page + at % a.page;
    }

    // Attend with as many heads at a time as fit; returns how many. A narrow cache's tokens lie in `widened`.
    int64_t attend_group(int64_t t, int64_t first, int64_t last, int64_t h, int64_t left, int64_t at, float* scores,
        int64_t next, const float* widened) const {
        const float* q = absorbed_[t * a.heads + h];
        float *most = most_ + at, *sums = sums_ + at, *total = totals_ + at * a.rank;
        const int heads = left >= WIDEST_GROUP ? WIDEST_GROUP : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int64_t tokens = last - first;
        auto with_heads = [&](const auto* pool, const auto& runs) {
            switch (heads) {
#ifdef __AVX512F__
            case 8: return attend<8>(a, pool, tokens, runs, q, most, sums, total, scores, next);
#endif
            case 4: return attend<4>(a, pool, tokens, runs, q, most, sums, total, scores, next);
            case 2: return attend<2>(a, pool, tokens, runs, q, most, sums, total, scores, next);
            default: return attend<1>(a, pool, tokens, runs, q, most, sums, total, scores, next);
            }
        };
        if (a.cache != CacheFormat::WHOLE) {
            with_heads(widened, [&](auto body) { body(0, 0, tokens); });
            return heads;
        }
        with_type(a.pool, a.pool_type,
            [&](auto* pool) { with_heads(pool, [&](auto body) { each_run(a, row(t), first, last, body); }); });
        return heads;
    }

    // Chunks put together, then W_UV.
    void values(Team& team, Scratch& own) const {
        const int64_t parts = a.heads >= 2 * team.count ? 1 : 2 * team.count;
        const int64_t rows = (a.value + parts - 1) / parts;
        float** attended = own.take_rows(T, a.rank);
        std::vector<float*> to(T);
        team.share(4, a.heads * parts, [&](int64_t item) {
            const int64_t h = item / parts, first = std::min(item % parts * rows, a.value);
            const int64_t last = std::min(first + rows, a.value);
            if (first == last) return;
            for (int64_t t = 0; t < T; ++t) {
                put_together(t, h, attended[t]);
                to[t] = value_[t] + h * a.value + first;
            }
            rows_times(a.w_uv, h * a.value + first, h * a.value + last, attended, T, to.data());
        });
    }

    void put_together(int64_t t, int64_t h, float* y) const {
        const int64_t chunks = chunks_of(t);
        auto at = [&](int64_t chunk) { return (t * chunks_ + chunk) * a.heads + h; };
        float most = -INFINITY, total = 0.0f;
        for (int64_t i = 0; i < chunks; ++i) most = std::max(most, most_[at(i)]);
        for (int64_t i = 0; i < chunks; ++i) total += sums_[at(i)] * std::exp(most_[at(i)] - most);
        for (int64_t i = 0; i < chunks; ++i) {
            const float share = std::exp(most_[at(i)] - most) / total;
            const float* part = totals_ + at(i) * a.rank;
            for (int64_t l = 0; l < a.rank; ++l) y[l] = i == 0 ? part[l] * share : std::fma(part[l], share, y[l]);
        }
    }

    void output(Team& team, Scratch& own) const {
        float** part = own.take_rows(T, BLOCK);
        float** x = value_;
        if (a.o.reads_integers()) {  // each thread makes its own integers: that takes less than to wait for another's
            x = take_tokens(own, T, a.o.columns, true);
            for (int64_t t = 0; t < T; ++t) std::copy(value_[t], value_[t] + a.o.columns, x[t]);
            fix_all(x, T, a.o.columns);
        }
        team.share(5, (a.o.rows + BLOCK - 1) / BLOCK, [&](int64_t item) {
            const int64_t from = item * BLOCK, to = std::min(from + BLOCK, a.o.rows);
            rows_times(a.o, from, to, x, T, part);
            add_bias(a.o_bias, from, to, T, part);
            for (int64_t t = 0; t < T; ++t)
                for (int64_t i = from, at = tokens_.rows[t] * a.hidden; i < to; ++i)
                    a.y[at + i] = a.x[at + i] + part[t][i - from];
        });
    }

    const AttentionArgs& a;
    const Tokens tokens_;
    const int64_t T;  // real ones
    int64_t D;
    bool first_, second_;  // whether the normed x, and the compressed query, become integers
    // What the phases hand on.
    float **compressed_, **query_, **latent_, **absorbed_, **value_;
    float *most_, *sums_, *totals_;  // [T, chunks, H] and [T, chunks, H, L]
    int64_t chunks_;                 // most of any token
};

}  // namespace ISA
