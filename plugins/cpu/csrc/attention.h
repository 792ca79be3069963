// The attention half of a decoder layer for one new token a sequence, absorbed: from the residual stream to itself.
#pragma once

#include <algorithm>

#include "linear.h"
#include "scratch.h"

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

// What H heads of one sequence see in one chunk: its maximum, sum and weighted latents a head.
template <int H, class P>
inline void attend(const AttentionArgs& a, const P* pool, int64_t row, int64_t first, int64_t last, const float* q,
    float* most, float* sums, float* total, float* scores, int64_t next) {
    const int64_t D = a.kv_a.rows, tokens = last - first;
    each_run(a, row, first, last,
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
    each_run(a, row, first, last, [&](int64_t slot, int64_t at, int64_t count) {
        const P* after = pool + (next < 0 ? slot : next + at) * D;
        weigh_all<H>(pool + slot * D, D, a.rank, count, scores + at * H, H, at == 0, total, a.rank, after);
    });
}

class Attention {
public:
    Attention(const AttentionArgs& args, Scratch& scratch) : a(args) {
        D = a.kv_a.rows;
        chunks_ = 1;
        for (int64_t b = 0; b < a.batch; ++b) chunks_ = std::max(chunks_, chunks_of_row(b));
        first_ = any_reads_integers(a.q_a.data ? a.q_a : a.q, a.kv_a), second_ = a.q_a.data && a.q.reads_integers();
        compressed_ = scratch.take_rows(a.batch, a.q_a.data ? a.q_a.rows : 0);
        query_ = scratch.take_rows(a.batch, a.q.rows);
        latent_ = scratch.take_rows(a.batch, D);
        absorbed_ = scratch.take_rows(a.batch * a.heads, D);
        value_ = scratch.take_rows(a.batch, a.heads * a.value);
        most_ = scratch.take(a.batch * chunks_ * a.heads);
        sums_ = scratch.take(a.batch * chunks_ * a.heads);
        totals_ = scratch.take(a.batch * chunks_ * a.heads * a.rank);
    }

    void run(Team& team) const {
        Scratch& own = own_scratch();
        const int64_t widest = std::max(a.hidden, a.q_a.data ? a.q_a.rows : 0);
        float** x = take_tokens(own, a.batch, widest, first_ || second_);
        for (int64_t b = 0; b < a.batch; ++b) rms_norm(a.x + b * a.hidden, a.norm, a.eps, a.hidden, x[b]);
        if (first_) fix_all(x, a.batch, a.hidden);
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
    int64_t length(int64_t row) const { return a.past_lengths[row] + 1; }
    int64_t chunks_of_row(int64_t row) const {
        const int64_t chunk = chunk_of(length(row));
        return (length(row) + chunk - 1) / chunk;
    }

    // Rows of two matrices, of the same tokens, shared out in blocks.
    void project(Team& team, float** x) const {
        const Matrix& first = a.q_a.data ? a.q_a : a.q;
        float** to = a.q_a.data ? compressed_ : query_;
        products(team, 0, first, a.q_a_bias, &a.kv_a, &a.kv_a_bias, x, to, latent_);
        if (a.q_a.data == nullptr) return;
        team.barrier();
        for (int64_t b = 0; b < a.batch; ++b) rms_norm(compressed_[b], a.q_norm, a.latent_eps, a.q_a.rows, x[b]);
        if (second_) fix_all(x, a.batch, a.q_a.rows);
        products(team, 1, a.q, Matrix{}, nullptr, nullptr, x, query_, nullptr);
    }

    void products(Team& team, int phase, const Matrix& m, const Matrix& bias, const Matrix* m2, const Matrix* bias2,
        float** x, float** y, float** y2) const {
        const int64_t blocks = (m.rows + BLOCK - 1) / BLOCK, more = m2 ? (m2->rows + BLOCK - 1) / BLOCK : 0;
        std::vector<float*> at(a.batch);
        team.share(phase, blocks + more, [&](int64_t item) {
            const bool second = item >= blocks;
            const Matrix& w = second ? *m2 : m;
            const int64_t from = (second ? item - blocks : item) * BLOCK, to = std::min(from + BLOCK, w.rows);
            for (int64_t b = 0; b < a.batch; ++b) at[b] = (second ? y2 : y)[b] + from;
            rows_times(w, from, to, x, a.batch, at.data());
            add_bias(second ? *bias2 : bias, from, to, a.batch, at.data());
        });
    }

    // The new token's latent goes to its page; each head's query is multiplied by W_UK and rotated.
    void absorb(Team& team, Scratch& own) const {
        const int64_t R = D - a.rank, width = a.nope + R;
        for (int64_t b = team.thread; b < a.batch; b += team.count) write_latent(b, R, own);
        const int64_t parts = a.heads >= 2 * team.count ? 1 : 2 * team.count;
        const int64_t columns = (a.rank / LANES / parts + 1) * LANES;
        std::vector<const float*> q(a.batch);
        std::vector<float*> to(a.batch);
        team.share(2, a.heads * parts, [&](int64_t item) {
            const int64_t h = item / parts, first = std::min(item % parts * columns, a.rank);
            const int64_t last = parts == 1 ? a.rank : std::min(first + columns, a.rank);
            for (int64_t b = 0; b < a.batch; ++b) {
                q[b] = query_[b] + h * width;
                to[b] = absorbed_[b * a.heads + h];
                if (first == 0) rotate(q[b] + a.nope, a.cos + b * R / 2, a.sin + b * R / 2, R, to[b] + a.rank);
            }
            with_type(a.w_uk.data, a.w_uk.type, [&](auto* w) {
                columns_times(w + h * a.nope * a.rank, a.nope, a.rank, first, last, q.data(), a.batch, to.data());
            });
        });
    }

    void write_latent(int64_t b, int64_t R, Scratch& own) const {
        float* c = own.take(a.rank);
        rms_norm(latent_[b], a.kv_norm, a.latent_eps, a.rank, c);
        const int64_t t = a.past_lengths[b];
        const int64_t slot =
            a.page_table[b * a.table_width + std::min(t / a.page, a.table_width - 1)] * a.page + t % a.page;
        with_type(a.pool, a.pool_type, [&](auto* pool) {
            auto* row = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(pool)>>*>(pool) + slot * D;
            for (int64_t i = 0; i < a.rank; ++i) put(row + i, c[i]);
            rotate(latent_[b] + a.rank, a.cos + b * R / 2, a.sin + b * R / 2, R, row + a.rank);
        });
    }

    void attend_all(Team& team, Scratch& own) const {
        float* scores = own.take(LARGEST_CHUNK * WIDEST_GROUP);
        const int64_t groups = (a.heads + WIDEST_GROUP - 1) / WIDEST_GROUP;
        team.share(3, a.batch * chunks_ * groups, [&](int64_t item) {
            const int64_t group = item % groups, chunk = item / groups % chunks_, b = item / groups / chunks_;
            const int64_t size = chunk_of(length(b)), first = chunk * size;
            if (first >= length(b)) return;
            const int64_t last = std::min(first + size, length(b));
            for (int64_t h = group * WIDEST_GROUP, end = std::min(h + WIDEST_GROUP, a.heads); h < end;) {
                const int64_t at = (b * chunks_ + chunk) * a.heads + h;
                h += attend_group(b, first, last, h, end - h, at, scores, slot_of(b, first + size * team.count));
            }
        });
    }

    // The place of a cached token in the pool; -1 beyond the sequence.
    int64_t slot_of(int64_t b, int64_t t) const {
        return t < length(b) ? a.page_table[b * a.table_width + t / a.page] * a.page + t % a.page : -1;
    }

    // Attend with as many heads at a time as fit; returns how many.
    int64_t attend_group(int64_t b, int64_t first, int64_t last, int64_t h, int64_t left, int64_t at, float* scores,
        int64_t next) const {
        const float* q = absorbed_[b * a.heads + h];
        float *most = most_ + at, *sums = sums_ + at, *total = totals_ + at * a.rank;
        const int heads = left >= WIDEST_GROUP ? WIDEST_GROUP : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        with_type(a.pool, a.pool_type, [&](auto* pool) {
            switch (heads) {
#ifdef __AVX512F__
            case 8: return attend<8>(a, pool, b, first, last, q, most, sums, total, scores, next);
#endif
            case 4: return attend<4>(a, pool, b, first, last, q, most, sums, total, scores, next);
            case 2: return attend<2>(a, pool, b, first, last, q, most, sums, total, scores, next);
            default: return attend<1>(a, pool, b, first, last, q, most, sums, total, scores, next);
            }
        });
        return heads;
    }

    // Chunks put together, then W_UV.
    void values(Team& team, Scratch& own) const {
        const int64_t parts = a.heads >= 2 * team.count ? 1 : 2 * team.count;
        const int64_t rows = (a.value + parts - 1) / parts;
        float** attended = own.take_rows(a.batch, a.rank);
        std::vector<float*> to(a.batch);
        team.share(4, a.heads * parts, [&](int64_t item) {
            const int64_t h = item / parts, first = std::min(item % parts * rows, a.value);
            const int64_t last = std::min(first + rows, a.value);
            if (first == last) return;
            for (int64_t b = 0; b < a.batch; ++b) {
                put_together(b, h, attended[b]);
                to[b] = value_[b] + h * a.value + first;
            }
            rows_times(a.w_uv, h * a.value + first, h * a.value + last, attended, a.batch, to.data());
        });
    }

    void put_together(int64_t b, int64_t h, float* y) const {
        const int64_t chunks = chunks_of_row(b);
        auto at = [&](int64_t chunk) { return (b * chunks_ + chunk) * a.heads + h; };
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
        float** part = own.take_rows(a.batch, BLOCK);
        float** x = value_;
        if (a.o.reads_integers()) {  // each thread makes its own integers: that takes less than to wait for another's
            x = take_tokens(own, a.batch, a.o.columns, true);
            for (int64_t b = 0; b < a.batch; ++b) std::copy(value_[b], value_[b] + a.o.columns, x[b]);
            fix_all(x, a.batch, a.o.columns);
        }
        team.share(5, (a.o.rows + BLOCK - 1) / BLOCK, [&](int64_t item) {
            const int64_t from = item * BLOCK, to = std::min(from + BLOCK, a.o.rows);
            rows_times(a.o, from, to, x, a.batch, part);
            add_bias(a.o_bias, from, to, a.batch, part);
            for (int64_t b = 0; b < a.batch; ++b)
                for (int64_t i = from; i < to; ++i) a.y[b * a.hidden + i] = a.x[b * a.hidden + i] + part[b][i - from];
        });
    }

    const AttentionArgs& a;
    int64_t D;
    bool first_, second_;  // whether the normed x, and the compressed query, become integers
    // What the phases hand on.
    float **compressed_, **query_, **latent_, **absorbed_, **value_;
    float *most_, *sums_, *totals_;  // [B, chunks, H] and [B, chunks, H, L]
    int64_t chunks_;                 // most of any row
};

}  // namespace ISA
