// How one row of logits becomes a token. engines/generation/sampling_numpy.py does the same, number for number.
#pragma once

#include <cstdint>

// One request's parameters, randomness and history; the same as plugins/cpu/sampling_row.py's SamplingRow.
struct SamplingRow {
    double top_p;
    double min_p;
    uint64_t key;
    uint64_t draws;  // how many random numbers were used
    int32_t* seen;   // tokens of prompt and answer, each once, with their number in the answer; null: not kept
    float* counts;
    const int32_t* banned;  // tokens that may not be picked
    const uint32_t* mask;   // a bit for each token that may be picked, the lowest first; null: all may
    const int32_t* biased;  // tokens whose logits biases are added to
    const float* biases;
    float steepness;  // log2(e) / temperature; 0 is greedy
    float repetition;
    float presence;
    float frequency;
    int32_t seen_count;
    int32_t seen_room;
    int32_t banned_count;
    int32_t made;        // tokens of the answer
    int32_t min_tokens;  // before so many, banned counts
    int32_t top_k;       // 0 keeps all
    int32_t logprobs;    // -1: none wanted, n: the chosen token's and the n likeliest tokens'
    int32_t biased_count;
};

struct SamplingTop {
    int64_t id;
    double logprob;
};

// The token of a row whose logits hold NaN or infinity, or no number above the least one among those that its mask
// leaves; the row records nothing.
constexpr int64_t NOT_FINITE = -1;

// A batch; tokens and logprobs have a place a row, tops `most` places a row.
struct SamplingBatch {
    SamplingRow* const* rows;
    const float* logits;  // [count, vocab]
    int64_t count, vocab, most;
    int64_t* tokens;
    double* logprobs;
    SamplingTop* tops;
};

using SampleRows = void (*)(const SamplingBatch&, int64_t from, int64_t last);
extern const SampleRows sample_rows_v3, sample_rows_v4;
