// Which experts a token goes to, and their weights: as the MoeRouter and MoeBiasedRouter ops define it.
#pragma once

#include <algorithm>

#include "vec.h"

namespace ISA {

// Ids of the `count` greatest scores, best first, of equal ones the lower id.
inline void best(const float* scores, int64_t n, int64_t count, int64_t* ids) {
    for (int64_t found = 0; found < count; ++found) {
        int64_t top = -1;
        for (int64_t i = 0; i < n; ++i) {
            if (std::find(ids, ids + found, i) != ids + found) continue;
            if (top < 0 || scores[i] > scores[top]) top = i;
        }
        ids[found] = top;
    }
}

// Scores of groups that are not among the best become `scores * keep + drop`.
inline void limit_groups(const FeedForwardArgs& a, float* scores, int64_t* ids, float* group_scores) {
    const int64_t size = a.experts / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
            if (scores[i] > first) {
                second = first;
                first = scores[i];
            } else {
                second = std::max(second, scores[i]);
            }
        }
        group_scores[g] = a.bias ? first + second : first;
    }
    best(group_scores, a.groups, a.top_groups, ids);
    for (int64_t g = 0; g < a.groups; ++g) {
        if (std::find(ids, ids + a.top_groups, g) != ids + a.top_groups) continue;
        for (int64_t i = g * size; i < (g + 1) * size; ++i) scores[i] = a.bias ? -INFINITY : 0.0f;
    }
}

// From logits [E] to ids [K] and weights [K]; scores and work have room for E numbers.
inline void route(
    const FeedForwardArgs& a, const float* logits, float* scores, float* work, int64_t* ids, float* weights) {
    const int64_t E = a.experts;
    if (a.bias) {
        for (int64_t i = 0; i < E; ++i) scores[i] = 1.0f / (1.0f + std::exp(-logits[i]));
    } else {
        const float most = *std::max_element(logits, logits + E);
        float total = 0.0f;
        for (int64_t i = 0; i < E; ++i) total += scores[i] = std::exp(logits[i] - most);
        for (int64_t i = 0; i < E; ++i) scores[i] /= total;
    }
    for (int64_t i = 0; i < E; ++i) work[i] = a.bias ? scores[i] + a.bias[i] : scores[i];
    if (a.top_groups < a.groups) limit_groups(a, work, ids, weights);
    best(work, E, a.top_k, ids);
    float total = 0.0f;
    for (int64_t k = 0; k < a.top_k; ++k) total += weights[k] = a.bias ? scores[ids[k]] : work[ids[k]];
    const bool normalised = a.normalised && a.top_k > 1;
    const float divisor = normalised ? total + 1e-20f : 1.0f, factor = a.bias || !normalised ? a.factor : 1.0f;
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] = weights[k] / divisor * factor;
}

}  // namespace ISA
