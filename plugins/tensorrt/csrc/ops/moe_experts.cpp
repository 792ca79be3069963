// MoeExperts: see plugins/kernels/moe_dispatch.py and moe_experts.py for the launches and the arithmetic.
#include "checks.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

#include <algorithm>

namespace deepseek_trt::moe_experts {
namespace {

// How many slots, chunks of them, and blocks of sorted slots a number of tokens makes.
struct Dispatch {
    using Sizes = spec::MoeExperts::Sizes;

    Dispatch(int64_t tokens, int64_t block)
        : slots(tokens * Sizes::K),
          chunks(ceil_div(slots, kDispatchChunk)),
          blocks((slots + std::min(+Sizes::E, slots) * (block - 1)) / block),
          sorted(blocks * block) {}

    int64_t slots, chunks, blocks, sorted;
};

struct Op {
    using Spec = spec::MoeExperts;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MoeDispatchCount, MoeDispatchOffsets, MoeDispatchScatter, MoeGateUp, MoeDown, MoeCombine>;

    struct Workspace {
        Ptr<int32_t> counts;
        Ptr<int32_t> offsets;
        Ptr<int32_t> block_expert;
        Ptr<int32_t> sorted_slots;
        Ptr<T> inner;
        Ptr<T> outer;
    };

    static void check(Spec::Attributes const& attributes) {
        if (attributes.activation != "silu") {
            throw Error("attribute \"activation\" is \"" + attributes.activation
                + "\", but the plugin computes \"silu\" only; run this model on ONNX Runtime");
        }
    }

    static Workspace lay_out(Arena& arena, Dispatch const& dispatch) {
        constexpr int64_t kWord = sizeof(int32_t);
        Workspace w;
        w.counts = arena.take<int32_t>(dispatch.chunks * Sizes::E * kWord);
        w.offsets = arena.take<int32_t>(dispatch.chunks * Sizes::E * kWord);
        w.block_expert = arena.take<int32_t>(dispatch.blocks * kWord);
        w.sorted_slots = arena.take<int32_t>(dispatch.sorted * kWord);
        w.inner = arena.take<T>(dispatch.slots * Sizes::I * kElementBytes);
        w.outer = arena.take<T>(dispatch.slots * Sizes::hidden * kElementBytes);
        return w;
    }

    // Whatever block the chip and the tokens will choose.
    static size_t workspace(Sizes const& largest) {
        size_t bytes = 0;
        for (auto const& row : MoeGateUp::rows()) {
            Arena arena;
            lay_out(arena, Dispatch(largest.T, row.constants.BLOCK_M));
            bytes = std::max(bytes, arena.size());
        }
        return bytes;
    }

    static void enqueue(Call<Op> const& call) {
        int64_t const block = call.kernels.get<MoeGateUp>(call.sizes.T).constants().BLOCK_M;
        Dispatch const dispatch(call.sizes.T, block);
        Arena arena(call.workspace);
        Workspace const w = lay_out(arena, dispatch);
        sort_slots(call, dispatch, w, block);
        run_experts(call, dispatch, w);
    }

    static void sort_slots(Call<Op> const& call, Dispatch const& dispatch, Workspace const& w, int64_t block) {
        int32_t const slots = as_i32(dispatch.slots);
        auto const& count = call.kernels.get<MoeDispatchCount>(call.sizes.T);
        auto const& offsets = call.kernels.get<MoeDispatchOffsets>(call.sizes.T);
        auto const& scatter = call.kernels.get<MoeDispatchScatter>(call.sizes.T);
        check_alike("CHUNK", kDispatchChunk, count.constants().CHUNK);
        check_alike("CHUNK", kDispatchChunk, scatter.constants().CHUNK);
        launch(count, {ceil_div(dispatch.sorted, kDispatchChunk)}, call.stream, call.in.ids, w.counts, w.sorted_slots,
            slots, as_i32(dispatch.sorted));
        launch(offsets, {1}, call.stream, w.counts, w.offsets, w.block_expert, as_i32(dispatch.chunks),
            as_i32(dispatch.blocks), as_i32(block));
        launch(scatter, {dispatch.chunks}, call.stream, call.in.ids, w.offsets, w.sorted_slots, slots);
    }

    static void run_experts(Call<Op> const& call, Dispatch const& dispatch, Workspace const& w) {
        int64_t const tokens = call.sizes.T;
        int32_t const slots = as_i32(dispatch.slots);
        auto const& gate_up = call.kernels.get<MoeGateUp>(tokens);
        auto const& down = call.kernels.get<MoeDown>(tokens);
        auto const& combine = call.kernels.get<MoeCombine>(tokens);
        check_alike("BLOCK_M", gate_up.constants().BLOCK_M, down.constants().BLOCK_M);
        launch(gate_up, {dispatch.blocks * ceil_div(Sizes::I, gate_up.constants().BLOCK_N)}, call.stream,
            call.in.hidden, call.in.gate_proj, call.in.up_proj, w.inner, w.sorted_slots, w.block_expert, slots);
        launch(down, {dispatch.blocks * ceil_div(Sizes::hidden, down.constants().BLOCK_N)}, call.stream, w.inner,
            call.in.down_proj, w.outer, w.sorted_slots, w.block_expert, slots);
        launch(combine,
            {ceil_div(tokens, combine.constants().BLOCK_T), ceil_div(Sizes::hidden, combine.constants().BLOCK_D)},
            call.stream, w.outer, call.in.weights, call.out.output, as_i32(tokens));
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::moe_experts
