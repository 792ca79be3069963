// MoeLayer: see plugins/kernels/moe for the launches and the arithmetic.
#include "checks.h"
#include "dispatch.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"
#include "router.h"

#include <algorithm>

namespace deepseek_trt::moe_layer {
namespace {

struct Op {
    using Spec = spec::MoeLayer;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MoeLogits, MoeChoose, MoeDispatchCount, MoeDispatchOffsets, MoeDispatchScatter,
        MoeLayerGateUp, MoeLayerDown, MoeCombine>;

    static constexpr int64_t kShared = Sizes::SI / Sizes::I;
    static constexpr int64_t kSlots = Sizes::K + kShared;  // a token's
    static constexpr int64_t kExperts = Sizes::E + kShared;

    struct Workspace {
        Ptr<float> partial;
        Ptr<float> weights;
        Ptr<int32_t> ids;
        SortMemory sort;
        Ptr<T> inner;
        Ptr<T> outer;
    };

    static void check(Spec::Attributes const& attributes) {
        check_routing<MoeChoose>(attributes);
        for (auto const& row : MoeChoose::rows()) {
            check_attribute("biased", attributes.biased, row.constants.BIASED);
        }
    }

    static Workspace lay_out(Arena& arena, Dispatch const& dispatch, int64_t splits) {
        constexpr int64_t kWord = 4;
        auto const partial = arena.take<float>(splits * (dispatch.slots / kSlots) * Sizes::E * kWord);
        auto const weights = arena.take<float>(dispatch.slots * kWord);
        auto const ids = arena.take<int32_t>(dispatch.slots * kWord);
        SortMemory const sort(arena, dispatch, kExperts);
        auto const inner = arena.take<T>(dispatch.slots * Sizes::I * kElementBytes);
        return {partial, weights, ids, sort, inner, arena.take<T>(dispatch.slots * Sizes::hidden * kElementBytes)};
    }

    static Dispatch dispatch_of(int64_t tokens, int64_t block) { return {tokens, kSlots, kExperts, block}; }

    // Whatever block and splits the chip and the tokens will choose: few tokens have more splits than many.
    static size_t workspace(Sizes const& largest) {
        size_t bytes = 0;
        for (auto const& logits : MoeLogits::rows()) {
            int64_t const most = logits.binary.max_tokens ? logits.binary.max_tokens : largest.T;
            for (auto const& row : MoeLayerGateUp::rows()) {
                Arena arena;
                lay_out(arena, dispatch_of(std::min(most, largest.T), row.constants.BLOCK_M), logits.constants.SPLITS);
                bytes = std::max(bytes, arena.size());
            }
        }
        return bytes;
    }

    static void enqueue(Call<Op> const& call) {
        int64_t const tokens = call.sizes.T;
        int64_t const block = call.kernels.get<MoeLayerGateUp>(tokens).constants().BLOCK_M;
        Dispatch const dispatch = dispatch_of(tokens, block);
        Arena arena(call.workspace);
        auto const& logits = call.kernels.get<MoeLogits>(tokens);
        Workspace const w = lay_out(arena, dispatch, logits.constants().SPLITS);
        route(call, logits, dispatch, w);
        run_experts(call, dispatch, w);
    }

    static void route(
        Call<Op> const& call, Loaded<MoeLogits> const& logits, Dispatch const& dispatch, Workspace const& w) {
        int64_t const tokens = call.sizes.T;
        int32_t const count = as_i32(tokens);
        auto const& choose = call.kernels.get<MoeChoose>(tokens);
        check_alike("SPLITS", logits.constants().SPLITS, choose.constants().SPLITS);
        check_alike("SHARED", kShared, choose.constants().SHARED);
        launch(logits,
            {ceil_div(Sizes::E, logits.constants().BLOCK_X), logits.constants().SPLITS,
                ceil_div(tokens, logits.constants().BLOCK_T)},
            call.stream, call.in.hidden, call.in.router_weight, w.partial, count);
        launch(choose, {ceil_div(tokens, choose.constants().BLOCK_T)}, call.stream, w.partial, call.in.correction_bias,
            w.weights, w.ids, w.sort.sorted_slots, w.sort.block_expert, count, as_i32(dispatch.blocks),
            as_i32(dispatch.block), call.attributes.routed_scaling_factor);
        if (!choose.constants().SORT) {
            sort_slots<MoeDispatchCount, MoeDispatchOffsets, MoeDispatchScatter>(
                call.kernels, call.stream, w.ids, dispatch, w.sort);
        }
    }

    static void run_experts(Call<Op> const& call, Dispatch const& dispatch, Workspace const& w) {
        int64_t const tokens = call.sizes.T;
        int32_t const slots = as_i32(dispatch.slots);
        auto const& gate_up = call.kernels.get<MoeLayerGateUp>(tokens);
        auto const& down = call.kernels.get<MoeLayerDown>(tokens);
        auto const& combine = call.kernels.get<MoeCombine>(tokens);
        check_alike("BLOCK_M", gate_up.constants().BLOCK_M, down.constants().BLOCK_M);
        launch(gate_up, {dispatch.blocks * ceil_div(Sizes::I, gate_up.constants().BLOCK_N)}, call.stream,
            call.in.hidden, call.in.gate_proj, call.in.up_proj, call.in.shared_gate, call.in.shared_up, w.inner,
            w.sort.sorted_slots, w.sort.block_expert, slots);
        launch(down, {dispatch.blocks * ceil_div(Sizes::hidden, down.constants().BLOCK_N)}, call.stream, w.inner,
            call.in.down_proj, call.in.shared_down, w.outer, w.sort.sorted_slots, w.sort.block_expert, slots);
        launch(combine,
            {ceil_div(tokens, combine.constants().BLOCK_T), ceil_div(Sizes::hidden, combine.constants().BLOCK_D)},
            call.stream, w.outer, w.weights, call.out.output, as_i32(tokens));
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::moe_layer
