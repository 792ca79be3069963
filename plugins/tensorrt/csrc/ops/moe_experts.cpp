// MoeExperts: see plugins/kernels/moe_dispatch.py and moe_experts.py for the launches and the arithmetic.
#include "checks.h"
#include "dispatch.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

#include <algorithm>

namespace deepseek_trt::moe_experts {
namespace {

struct Op {
    using Spec = spec::MoeExperts;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MoeDispatchCount, MoeDispatchOffsets, MoeDispatchScatter, MoeGateUp, MoeDown, MoeCombine>;

    struct Workspace {
        SortMemory sort;
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
        SortMemory const sort(arena, dispatch, Sizes::E);
        auto const inner = arena.take<T>(dispatch.slots * Sizes::I * kElementBytes);
        return {sort, inner, arena.take<T>(dispatch.slots * Sizes::hidden * kElementBytes)};
    }

    // Whatever block the chip and the tokens will choose.
    static size_t workspace(Sizes const& largest) {
        size_t bytes = 0;
        for (auto const& row : MoeGateUp::rows()) {
            Arena arena;
            lay_out(arena, dispatch_of(largest.T, row.constants.BLOCK_M));
            bytes = std::max(bytes, arena.size());
        }
        return bytes;
    }

    static Dispatch dispatch_of(int64_t tokens, int64_t block) { return {tokens, Sizes::K, Sizes::E, block}; }

    static void enqueue(Call<Op> const& call) {
        int64_t const block = call.kernels.get<MoeGateUp>(call.sizes.T).constants().BLOCK_M;
        Dispatch const dispatch = dispatch_of(call.sizes.T, block);
        Arena arena(call.workspace);
        Workspace const w = lay_out(arena, dispatch);
        sort_slots<MoeDispatchCount, MoeDispatchOffsets, MoeDispatchScatter>(
            call.kernels, call.stream, call.in.ids, dispatch, w.sort);
        run_experts(call, dispatch, w);
    }

    static void run_experts(Call<Op> const& call, Dispatch const& dispatch, Workspace const& w) {
        int64_t const tokens = call.sizes.T;
        int32_t const slots = as_i32(dispatch.slots);
        auto const& gate_up = call.kernels.get<MoeGateUp>(tokens);
        auto const& down = call.kernels.get<MoeDown>(tokens);
        auto const& combine = call.kernels.get<MoeCombine>(tokens);
        check_alike("BLOCK_M", gate_up.constants().BLOCK_M, down.constants().BLOCK_M);
        launch(gate_up, {dispatch.blocks * ceil_div(Sizes::I, gate_up.constants().BLOCK_N)}, call.stream,
            call.in.hidden, call.in.gate_proj, call.in.up_proj, w.inner, w.sort.sorted_slots, w.sort.block_expert,
            slots);
        launch(down, {dispatch.blocks * ceil_div(Sizes::hidden, down.constants().BLOCK_N)}, call.stream, w.inner,
            call.in.down_proj, w.outer, w.sort.sorted_slots, w.sort.block_expert, slots);
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
