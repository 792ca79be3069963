// The counting sort of slots by expert: its sizes and its three launches, see plugins/kernels/moe_dispatch.py.
#pragma once

#include "call.h"
#include "checks.h"
#include "kernel_tables.h"

#include <algorithm>

namespace deepseek_trt {

// How many slots, chunks of them, and blocks of sorted slots a number of tokens makes; `a_token` slots are a token's.
struct Dispatch {
    Dispatch(int64_t tokens, int64_t a_token, int64_t experts, int64_t block)
        : slots(tokens * a_token),
          chunks(ceil_div(slots, kDispatchChunk)),
          block(block),
          blocks((slots + std::min(experts, slots) * (block - 1)) / block),
          sorted(blocks * block) {}

    int64_t slots, chunks, block, blocks, sorted;
};

// Where the sort works, and what it leaves: block_expert and sorted_slots.
struct SortMemory {
    SortMemory(Arena& arena, Dispatch const& dispatch, int64_t experts)
        : counts(arena.take<int32_t>(dispatch.chunks * experts * kWord)),
          offsets(arena.take<int32_t>(dispatch.chunks * experts * kWord)),
          block_expert(arena.take<int32_t>(dispatch.blocks * kWord)),
          sorted_slots(arena.take<int32_t>(dispatch.sorted * kWord)) {}

    static constexpr int64_t kWord = sizeof(int32_t);
    Ptr<int32_t> counts, offsets, block_expert, sorted_slots;
};

// Count, Offsets and Scatter are the op's own kernels.
template <class Count, class Offsets, class Scatter, class Kernels>
void sort_slots(
    Kernels const& kernels, cudaStream_t stream, Ptr<int32_t> ids, Dispatch const& dispatch, SortMemory const& memory) {
    auto const& count = kernels.template get<Count>();
    auto const& offsets = kernels.template get<Offsets>();
    auto const& scatter = kernels.template get<Scatter>();
    int32_t const slots = as_i32(dispatch.slots);
    check_alike("CHUNK", kDispatchChunk, count.constants().CHUNK);
    check_alike("CHUNK", kDispatchChunk, scatter.constants().CHUNK);
    launch(count, {ceil_div(dispatch.sorted, kDispatchChunk)}, stream, ids, memory.counts, memory.sorted_slots, slots,
        as_i32(dispatch.sorted));
    launch(offsets, {1}, stream, memory.counts, memory.offsets, memory.block_expert, as_i32(dispatch.chunks),
        as_i32(dispatch.blocks), as_i32(dispatch.block));
    launch(scatter, {dispatch.chunks}, stream, ids, memory.offsets, memory.sorted_slots, slots);
}

}  // namespace deepseek_trt
