// What the operators hand to the kernels: plain pointers and sizes, and where each instruction set's kernels are.
#pragma once

#include <atomic>
#include <cstdint>

#include "activation.h"  // generated
#include "team.h"

enum class Type : int { FLOAT32 = 1, FLOAT16 = 10, BFLOAT16 = 16 };  // ONNX's numbers
// Of weights: numbers of a Type; or codes of 8 bits, or two of 4 bits a byte, of which 32 share a scale; or float8
// E4M3, of which blocks of 128 x 128 do.
enum class Format : int { WHOLE, INT8, INT4, FP8 };

// Of cached latents: numbers of a Type; or codes of 8 bits, with a scale for each group of a token's.
enum class CacheFormat : int64_t { WHOLE, INT8, FP8 };

// Counts over all calls: layers that had experts, and experts read in them, each once however many tokens chose it.
struct ExpertsHit {
    std::atomic<int64_t> layers{0}, experts{0};
};

// Rows of weights, side by side in memory; data null where the model has none.
struct Matrix {
    const char* data = nullptr;
    Type type = Type::FLOAT32;  // where whole
    int64_t rows = 0, columns = 0;
    Format format = Format::WHOLE;
    const char* scales = nullptr;  // float16 [rows, columns / 32]; of FP8 float32, of blocks of each matrix
    int64_t scale_rows = 0, scale_columns = 0;
    int64_t each = 0;  // rows of one matrix of a stack

    // Whether tokens become integers before they are multiplied with it.
    bool reads_integers() const { return format == Format::INT8 || format == Format::INT4; }
};

template <class... Matrices>
bool any_reads_integers(const Matrices&... all) {
    return (all.reads_integers() || ...);
}

// B sequences of S new tokens, right-padded; H heads; N, R, V widths of a head's nope, rope and value part; L rank;
// D = L + R.
struct AttentionArgs {
    const float *x, *cos, *sin;  // [B * S, hidden], [B, S, R/2], [B, S, R/2]
    char* pool;                  // [P, page, D], written in place; codes of a narrow cache [P, page, L]
    Type pool_type;              // of a narrow cache rest's
    CacheFormat cache;
    char* rest;                 // of a narrow cache [P, page, R + L / group]: rope parts, then scales
    int64_t group, rest_width;  // rest_width is R + L / group
    int64_t codes, rest_rows;   // L as the codes' pool has it, P * page as the other has it
    const int32_t *page_table, *past_lengths, *sequence_lengths;  // [B, M], [B], [B]: real ones among the S
    float* y;                                                     // [B * S, hidden]
    int64_t batch, sequence, hidden, pages, page, table_width, heads, nope, value, rank;
    // D, B * S, R/2, B, B, B * S, B as the inputs have them
    int64_t latent, rope_rows, rope, table_rows, lengths, tokens, sequences;
    float eps, latent_eps, scale;
    Matrix norm, q_a, q_norm, q, kv_a, kv_norm, w_uk, w_uv, o;  // q_a and q_norm only with query compression
    Matrix q_a_bias, kv_a_bias, o_bias;
};

struct Mlp {
    Matrix gate, up, down, gate_bias, up_bias, down_bias;
};

// T = B * S tokens, right-padded.
struct FeedForwardArgs {
    const float* x;                   // [T, hidden]
    const int32_t* sequence_lengths;  // [B]
    float* y;                         // [T, hidden]
    int64_t batch, tokens, hidden, experts, expert_width;
    float eps;
    Activation activation;
    Matrix norm;
    Mlp shared;  // of all tokens; may be missing where there are experts
    // Routing; experts is 0 for a dense layer.
    // gate, up: [experts * expert_width, hidden]; down: [experts * hidden, expert_width]
    Matrix router, gate, up, down;
    const float* bias;  // of biased routing, else null
    int64_t biases;     // how many there are
    int64_t top_k, groups, top_groups;
    bool normalised;
    float factor;
    ExpertsHit* hit;  // counts this call, too; null where it is not to be counted
};

struct HeadArgs {
    const float* x;                   // [T, hidden]
    const int32_t* sequence_lengths;  // [B] where tokens are right-padded, else null: every token is real
    float* y;                         // [T, vocab]
    int64_t batch, tokens, hidden;
    float eps;
    Matrix norm, head;
};

struct Kernels {
    void (*attention)(const AttentionArgs&, Pool&);
    void (*feed_forward)(const FeedForwardArgs&, Pool&);
    void (*head)(const HeadArgs&, Pool&);
    void (*prefill_attention)(const AttentionArgs&, Pool&);
    void (*prefill_feed_forward)(const FeedForwardArgs&, Pool&);
};

extern const Kernels kernels_v3;  // AVX2 and FMA
extern const Kernels kernels_v4;  // AVX-512
