// Prints a checksum of narrow products for each format and width, and of fp8 the panels of a prefill; with a word on
// the command line, those that this file computes by itself, one operation after the other.
#include <cstdio>
#include <vector>

#include "gemm.h"
#include "linear.h"

namespace {

using namespace ISA;

uint32_t state = 1;

uint32_t drawn() {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

struct Narrow {
    std::vector<char> codes;
    std::vector<_Float16> scales;
    Matrix matrix;

    Narrow(Format format, int64_t rows, int64_t columns)
        : codes(rows * columns / (format == Format::INT4 ? 2 : 1)), scales(rows * columns / GROUP) {
        for (char& code : codes) code = static_cast<char>(drawn());
        for (_Float16& scale : scales) scale = static_cast<_Float16>(1e-4f * static_cast<float>(1 + drawn() % 200));
        matrix.data = codes.data(), matrix.scales = reinterpret_cast<const char*>(scales.data());
        matrix.rows = matrix.scale_rows = rows, matrix.columns = columns, matrix.scale_columns = columns / GROUP;
        matrix.format = format;
    }
    int code(int64_t row, int64_t k) const {
        const int64_t at = row * matrix.columns + k;
        if (matrix.format == Format::INT8) return static_cast<int8_t>(codes[at]);
        return static_cast<uint8_t>(codes[at / 2]) >> (at % 2 * 4) & 15;
    }
};

// A group's scale and integers.
float fixed_of(const float* x, int* integers) {
    float most = 0.0f;
    for (int i = 0; i < GROUP; ++i) most = std::fmax(most, std::fabs(x[i]));
    for (int i = 0; i < GROUP; ++i) {
        volatile const float scaled = most > 0.0f ? x[i] * (32767.0f / most) : 0.0f;
        integers[i] = static_cast<int>(std::nearbyint(scaled));
    }
    return most > 0.0f ? most / 32767.0f : 0.0f;
}

float product(const Narrow& w, int64_t row, const float* x) {
    const int64_t groups = w.matrix.columns / GROUP;
    float lanes[LANES] = {};
    std::vector<int> integers(w.matrix.columns);
    std::vector<float> scales(groups);
    for (int64_t g = 0; g < groups; ++g)
        scales[g] = static_cast<float>(w.scales[row * groups + g]) * fixed_of(x + g * GROUP, &integers[g * GROUP]);
    for (int64_t g = 0; g < groups; ++g) {
        if (w.matrix.format == Format::INT4 && g % STRETCH == 0)
            for (int64_t i = g; i < std::min(g + STRETCH, groups); ++i) {
                int sum = 0;
                for (int k = 0; k < GROUP; ++k) sum += integers[i * GROUP + k];
                lanes[i - g] = std::fma(static_cast<float>(-8 * sum), scales[i], lanes[i - g]);
            }
        for (int l = 0; l < 8; ++l) {
            int four = 0;
            for (int64_t k = g * GROUP + 4 * l; k < g * GROUP + 4 * l + 4; ++k) four += w.code(row, k) * integers[k];
            float& lane = lanes[g % 2 * 8 + l];
            lane = std::fma(static_cast<float>(four), scales[g], lane);
        }
    }
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

// Matrices of fp8 one after the other, and what they stand for by the definition of E4M3 (but NaN, which is 480).
struct Blocks {
    std::vector<uint8_t> codes;
    std::vector<float> scales;
    Matrix matrix;

    Blocks(int64_t stack, int64_t each, int64_t columns)
        : codes(stack * each * columns), scales(stack * blocks(each) * blocks(columns)) {
        for (uint8_t& code : codes) code = static_cast<uint8_t>(drawn());
        for (float& scale : scales) scale = 1e-4f * static_cast<float>(drawn() % 200);
        matrix.data = reinterpret_cast<const char*>(codes.data());
        matrix.scales = reinterpret_cast<const char*>(scales.data());
        matrix.rows = stack * each, matrix.columns = columns, matrix.each = each;
        matrix.scale_rows = stack * blocks(each), matrix.scale_columns = blocks(columns);
        matrix.format = Format::FP8;
    }
    static int64_t blocks(int64_t size) { return (size + 127) / 128; }
    float number(int64_t row, int64_t k) const {
        const int code = codes[row * matrix.columns + k], exponent = code >> 3 & 15, mantissa = code & 7;
        const float size = exponent ? std::ldexp(8.0f + static_cast<float>(mantissa), exponent - 10)
                                    : std::ldexp(static_cast<float>(mantissa), -9);
        const int64_t block = row / matrix.each * blocks(matrix.each) + row % matrix.each / 128;
        return (code & 128 ? -size : size) * scales[block * matrix.scale_columns + k / 128];
    }
    float product(int64_t row, const float* x) const {
        float lanes[2 * LANES] = {};
        for (int64_t k = 0; k < matrix.columns; ++k) {
            float& lane = lanes[k % (2 * LANES)];
            lane = std::fma(number(row, k), x[k], lane);
        }
        for (int half = LANES; half; half /= 2)
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        return lanes[0];
    }
};

void print(const std::vector<float>& numbers) {
    uint64_t sum = 14695981039346656037u;
    for (const float number : numbers) {
        uint32_t bits;
        std::memcpy(&bits, &number, 4);
        sum = (sum ^ bits) * 1099511628211u;
    }
    std::printf("%016lx\n", static_cast<unsigned long>(sum));
}

void run(Format format, int64_t columns, bool alone) {
    constexpr int64_t ROWS = 13, TOKENS = 23;
    const Narrow w(format, ROWS, columns);
    Scratch scratch;
    float** x = take_tokens(scratch, TOKENS, columns, true);
    for (int64_t t = 0; t < TOKENS; ++t) {
        for (int64_t k = 0; k < columns; ++k)
            x[t][k] =
                static_cast<float>(static_cast<int>(drawn() % 20001) - 10000) * (k / GROUP % 5 == 2 ? 0.0f : 1e-3f);
        fix(x[t], columns);
    }
    std::vector<float> y(TOKENS * ROWS);
    for (int64_t t = 0; t < TOKENS; ++t)
        for (int64_t r = 0; alone && r < ROWS; ++r) y[t * ROWS + r] = product(w, r, x[t]);
    std::vector<float*> rows(TOKENS);
    for (int64_t t = 0; t < TOKENS; ++t) rows[t] = &y[t * ROWS];
    if (!alone) rows_times(w.matrix, 0, ROWS, x, TOKENS, rows.data());
    print(y);
}

// Decode's products, and the panels that prefill's are made with.
void run_fp8(int64_t each, int64_t columns, bool alone) {
    constexpr int64_t STACK = 3, TOKENS = 23;
    const Blocks w(STACK, each, columns);
    Scratch scratch;
    float** x = scratch.take_rows(TOKENS, columns);
    for (int64_t t = 0; t < TOKENS; ++t)
        for (int64_t k = 0; k < columns; ++k)
            x[t][k] = static_cast<float>(static_cast<int>(drawn() % 20001) - 10000) * 1e-3f;
    const int64_t rows = w.matrix.rows;
    std::vector<float> y(TOKENS * rows), panels;
    std::vector<float*> to(TOKENS);
    for (int64_t t = 0; t < TOKENS; ++t) to[t] = &y[t * rows];
    for (int64_t t = 0; alone && t < TOKENS; ++t)
        for (int64_t r = 0; r < rows; ++r) y[t * rows + r] = w.product(r, x[t]);
    if (!alone) rows_times(w.matrix, 0, rows, x, TOKENS, to.data());
    print(y);
    for (int64_t from = 0; from < columns; from += K_BLOCK) {
        const int64_t depth = std::min(K_BLOCK, columns - from), count = (rows + LANES - 1) / LANES;
        std::vector<float> packed(count * depth * LANES);
        if (!alone) pack(w.matrix, 0, rows, from, depth, packed.data());
        for (int64_t r = 0; alone && r < rows; ++r)
            for (int64_t k = 0; k < depth; ++k)
                packed[(r / LANES * depth + k) * LANES + r % LANES] = w.number(r, from + k);
        panels.insert(panels.end(), packed.begin(), packed.end());
    }
    print(panels);
}

}  // namespace

int main(int count, char**) {
    for (const Format format : {Format::INT8, Format::INT4})
        for (const int64_t groups : {1, 2, 3, 15, 16, 17, 18, 31, 33, 44}) {
            state = 1;
            run(format, groups * GROUP, count > 1);
        }
    for (const int64_t each : {5, 131})
        for (const int64_t columns : {1, 16, 31, 100, 128, 144, 200, 256, 300, 700}) {
            state = 1;
            run_fp8(each, columns, count > 1);
        }
}
