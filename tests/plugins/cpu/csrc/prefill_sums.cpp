// Prints checksums of both halves of a layer in a prefill, for sizes that are no multiples of any tile; and whether
// tokens that decode takes together come out as one after the other.
#include <cstdio>
#include <cstring>
#include <vector>

#include "args.h"

namespace {

uint32_t state = 1;

float drawn() {
    state = state * 1664525u + 1013904223u;
    return (state >> 9) / 8388608.0f - 0.5f;
}

// Numbers that live as long as the process.
float* numbers(int64_t n, float size) {
    float* data = (new std::vector<float>(n))->data();
    for (int64_t i = 0; i < n; ++i) data[i] = size * drawn();
    return data;
}

Matrix matrix(int64_t rows, int64_t columns, Type type) {
    Matrix m;
    m.rows = rows, m.columns = columns, m.type = type;
    float* data = numbers(rows * columns, 2.0f / __builtin_sqrtf(static_cast<float>(columns)));
    m.data = reinterpret_cast<char*>(data);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const float x = data[i];
        uint32_t bits;
        __builtin_memcpy(&bits, &x, 4);
        if (type == Type::FLOAT16) reinterpret_cast<_Float16*>(data)[i] = static_cast<_Float16>(x);
        if (type == Type::BFLOAT16) reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
    }
    return m;
}

// fp8 codes and scales of matrices of `each` rows.
Matrix blocks(int64_t rows, int64_t columns, int64_t each) {
    const auto count = [](int64_t size) { return (size + 127) / 128; };
    Matrix m;
    m.rows = rows, m.columns = columns, m.each = each, m.format = Format::FP8;
    m.scale_rows = rows / each * count(each), m.scale_columns = count(columns);
    m.scales = reinterpret_cast<char*>(numbers(m.scale_rows * m.scale_columns, 2e-3f));
    auto* codes = new std::vector<char>(rows * columns);
    for (char& code : *codes) code = static_cast<char>(255.0f * drawn());
    m.data = codes->data();
    return m;
}

// Codes that all bits stand for, where the columns are whole groups; `each` rows are a matrix of a stack, 0: all.
Matrix linear(int64_t rows, int64_t columns, Type type, Format format, int64_t each = 0) {
    constexpr int64_t GROUP = 32;
    if (format == Format::FP8) return blocks(rows, columns, each ? each : rows);
    if (format == Format::WHOLE || columns % GROUP) return matrix(rows, columns, type);
    Matrix m = matrix(rows, columns / GROUP, Type::FLOAT16);
    auto* scales = reinterpret_cast<_Float16*>(const_cast<char*>(m.data));
    for (int64_t i = 0; i < rows * columns / GROUP; ++i) scales[i] = scales[i] * static_cast<_Float16>(0.002f);
    m.scales = m.data, m.scale_rows = rows, m.scale_columns = columns / GROUP, m.columns = columns, m.format = format;
    auto* codes = new std::vector<char>(rows * columns / (format == Format::INT4 ? 2 : 1));
    for (char& code : *codes) code = static_cast<char>(255.0f * drawn());
    m.data = codes->data();
    return m;
}

void print(const float* data, int64_t n) {
    uint64_t sum = 14695981039346656037u;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, data + i, 4);
        sum = (sum ^ bits) * 1099511628211u;
    }
    std::printf(" %016lx", static_cast<unsigned long>(sum));
}

struct Sizes {
    int64_t hidden, heads, experts, inner, nope, rope, value, rank;
};

bool same(const float* x, const float* y, int64_t n) { return std::memcmp(x, y, n * sizeof(float)) == 0; }

int64_t pool_bytes(const AttentionArgs& a) {
    return a.pages * a.page * (a.cache == CacheFormat::WHOLE ? a.latent * 4 : a.rank);
}
int64_t rest_bytes(const AttentionArgs& a) { return a.pages * a.page * a.rest_width * 4; }

// A layer's pools, copied.
struct Pools {
    std::vector<char> pool, rest;

    explicit Pools(const AttentionArgs& a)
        : pool(a.pool, a.pool + pool_bytes(a)), rest(a.rest, a.rest + rest_bytes(a)) {}
    void give(AttentionArgs& a) { a.pool = pool.data(), a.rest = rest.data(); }
};

// Up to 8 tokens a row at once, against one call a token; of a layer's halves and of a head.
bool decodes_alike(AttentionArgs a, FeedForwardArgs f, const Matrix& head, Pool& pool) {
    constexpr int64_t S = 8;
    constexpr int32_t lengths[] = {8, 2, 5, 1}, one[] = {1};
    ExpertsHit hit;
    const int64_t hidden = a.hidden;
    Pools ours(a), theirs(a);
    std::vector<float> y(3 * hidden + head.rows);
    a.sequence = S, a.tokens = a.rope_rows = a.batch * S, a.sequence_lengths = lengths;
    ours.give(a);
    f.tokens = a.tokens, f.sequence_lengths = lengths, f.hit = &hit;
    HeadArgs h{a.x, lengths, numbers(a.tokens * head.rows, 1), a.batch, a.tokens, hidden, 1e-6f, a.norm, head};
    kernels_v3.attention(a, pool), kernels_v3.feed_forward(f, pool), kernels_v3.head(h, pool);
    bool alike = true;
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t s = 0; s < lengths[b]; ++s) {
            const int64_t t = b * S + s;
            const int32_t past[] = {static_cast<int32_t>(a.past_lengths[b] + s)};
            AttentionArgs aa = a;
            aa.batch = aa.sequence = aa.tokens = aa.rope_rows = aa.table_rows = aa.lengths = aa.sequences = 1;
            aa.x += t * hidden, aa.cos += t * a.rope, aa.sin += t * a.rope, aa.page_table += b * a.table_width;
            aa.past_lengths = past, aa.sequence_lengths = one, aa.y = y.data();
            theirs.give(aa);
            FeedForwardArgs ff = f;
            ff.x += t * hidden, ff.y = y.data() + hidden, ff.batch = ff.tokens = 1, ff.sequence_lengths = one;
            HeadArgs hh = h;
            hh.x += t * hidden, hh.y = y.data() + 2 * hidden, hh.tokens = 1, hh.sequence_lengths = nullptr;
            kernels_v3.attention(aa, pool), kernels_v3.feed_forward(ff, pool), kernels_v3.head(hh, pool);
            alike = alike && same(aa.y, a.y + t * hidden, hidden) && same(ff.y, f.y + t * hidden, hidden)
                && same(hh.y, h.y + t * head.rows, head.rows);
        }
    return alike && ours.pool == theirs.pool && ours.rest == theirs.rest;
}

// A narrow cache of drawn codes, rope parts and scales.
void narrow(AttentionArgs& a, CacheFormat cache) {
    const int64_t slots = a.pages * a.page, rope = a.latent - a.rank;
    a.cache = cache, a.group = a.rank % 128 ? a.rank : 128;
    a.codes = a.rank, a.rest_width = rope + a.rank / a.group, a.rest_rows = slots;
    auto* codes = new std::vector<char>(slots * a.rank);
    for (char& code : *codes) code = static_cast<char>(255.0f * drawn());
    float* rest = numbers(slots * a.rest_width, 2);
    for (int64_t i = 0; i < slots * a.rest_width; ++i)
        if (i % a.rest_width >= rope) rest[i] *= cache == CacheFormat::FP8 ? 0.003f : 0.01f;
    a.pool = codes->data(), a.rest = reinterpret_cast<char*>(rest);
}

void run(const Sizes& z, Type type, Format format, Pool& pool, CacheFormat cache = CacheFormat::WHOLE) {
    constexpr int64_t B = 4, S = 50, page = 4, M = 200;
    constexpr int32_t past[B] = {0, 300, 520, 7}, lengths[B] = {50, 2, 33, 1};
    std::vector<int32_t> table(B * M);
    for (int64_t i = 0; i < B * M; ++i) table[i] = static_cast<int32_t>(1 + i * 7 % (B * M));
    const int64_t latent = z.rank + z.rope, pages = B * M + 1, compressed = 21;
    AttentionArgs a{};
    a.x = numbers(B * S * z.hidden, 2), a.y = numbers(B * S * z.hidden, 1);
    a.cos = numbers(B * S * z.rope / 2, 1), a.sin = numbers(B * S * z.rope / 2, 1);
    float* cached = numbers(pages * page * latent, 2);
    a.pool = reinterpret_cast<char*>(cached), a.pool_type = Type::FLOAT32;
    a.page_table = table.data(), a.past_lengths = past, a.sequence_lengths = lengths;
    a.batch = B, a.sequence = S, a.hidden = z.hidden, a.pages = pages, a.page = page, a.table_width = M;
    a.heads = z.heads, a.nope = z.nope, a.value = z.value, a.rank = z.rank;
    a.latent = latent, a.rope_rows = a.tokens = B * S, a.rope = z.rope / 2;
    a.table_rows = a.lengths = a.sequences = B;
    a.eps = a.latent_eps = 1e-6f, a.scale = 0.3f;
    a.norm = matrix(1, z.hidden, type), a.q_a = linear(compressed, z.hidden, type, format);
    a.q_norm = matrix(1, compressed, type), a.q = linear(z.heads * (z.nope + z.rope), compressed, type, format);
    a.kv_a = linear(latent, z.hidden, type, format), a.kv_norm = matrix(1, z.rank, type);
    a.w_uk = matrix(z.heads * z.nope, z.rank, type), a.w_uv = matrix(z.heads * z.value, z.rank, type);
    a.o = linear(z.hidden, z.heads * z.value, type, format), a.o_bias = matrix(1, z.hidden, type);
    FeedForwardArgs f{};
    f.x = a.x, f.y = numbers(B * S * z.hidden, 1), f.tokens = B * S, f.batch = B, f.sequence_lengths = lengths;
    f.hidden = z.hidden, f.experts = z.experts, f.expert_width = z.inner, f.eps = 1e-6f, f.norm = a.norm;
    f.shared = {linear(2 * z.inner, z.hidden, type, format), linear(2 * z.inner, z.hidden, type, format),
        linear(z.hidden, 2 * z.inner, type, format), {}, {}, {}};
    f.router = matrix(z.experts, z.hidden, type), f.gate = linear(z.experts * z.inner, z.hidden, type, format, z.inner);
    f.up = linear(z.experts * z.inner, z.hidden, type, format, z.inner);
    f.down = linear(z.experts * z.hidden, z.inner, type, format, z.hidden);
    f.top_k = 3, f.groups = f.top_groups = 1, f.factor = 1.0f;
    if (cache != CacheFormat::WHOLE) narrow(a, cache);
    kernels_v3.prefill_attention(a, pool);
    kernels_v3.prefill_feed_forward(f, pool);
    print(a.y, B * S * z.hidden), print(reinterpret_cast<float*>(a.pool), pool_bytes(a) / 4);
    print(f.y, B * S * z.hidden);
    if (cache != CacheFormat::WHOLE) print(reinterpret_cast<float*>(a.rest), rest_bytes(a) / 4);
    std::printf(" %s\n", decodes_alike(a, f, linear(70, z.hidden, type, format), pool) ? "alike" : "not alike");
}

}  // namespace

int main(int count, char**) {
    Pool& pool = Pool::of(count);  // as many threads as words on the command line
    const Sizes sizes[] = {{40, 3, 8, 20, 10, 6, 14, 24}, {33, 1, 4, 17, 3, 2, 5, 9}, {100, 10, 9, 36, 24, 8, 20, 36},
        {256, 5, 7, 64, 48, 32, 40, 300}, {512, 8, 32, 130, 128, 64, 128, 512}};
    for (const Type type : {Type::FLOAT32, Type::FLOAT16, Type::BFLOAT16})
        for (const Sizes& z : sizes) {
            state = 1;
            run(z, type, Format::WHOLE, pool);
        }
    for (const Sizes& z : sizes) {
        state = 1;
        run(z, Type::FLOAT32, Format::FP8, pool);
    }
    for (const Format format : {Format::INT8, Format::INT4})
        for (const Sizes& z : {Sizes{96, 3, 8, 32, 10, 6, 32, 24}, Sizes{512, 8, 9, 80, 128, 64, 128, 512}}) {
            state = 1;
            run(z, Type::FLOAT32, format, pool);
        }
    for (const CacheFormat cache : {CacheFormat::INT8, CacheFormat::FP8})
        for (const Sizes& z : sizes) {
            state = 1;
            run(z, Type::FLOAT32, Format::WHOLE, pool, cache);
        }
}
