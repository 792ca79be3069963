// MoeExpertsNarrow of any format: see plugins/kernels/moe_dispatch.py and narrow/experts.py for the launches.
#pragma once

#include "checks.h"
#include "kernel_tables.h"
#include "narrow_checks.h"
#include "op_tables.h"
#include "plugin.h"

#include <algorithm>

namespace deepseek_trt {

// Format has: Spec, Count, Offsets, Scatter, GateUp, Down and Combine, the generated tables of its op and kernels;
// kName and kGroup.
template <class Format>
struct MoeExpertsNarrowOp {
    using Spec = typename Format::Spec;
    using Sizes = typename Spec::Sizes;
    using Count = typename Format::Count;
    using Offsets = typename Format::Offsets;
    using Scatter = typename Format::Scatter;
    using GateUp = typename Format::GateUp;
    using Down = typename Format::Down;
    using Combine = typename Format::Combine;
    using Kernels = KernelSet<Count, Offsets, Scatter, GateUp, Down, Combine>;

    // How many slots, chunks of them, and blocks of sorted slots the tokens make, and where their workspaces lie.
    struct Plan {
        Plan(int64_t tokens, int64_t block, Arena& arena)
            : slots(tokens * Sizes::K),
              chunks(ceil_div(slots, kDispatchChunk)),
              blocks((slots + std::min(+Sizes::E, slots) * (block - 1)) / block),
              sorted(blocks * block) {
            constexpr int64_t kWord = sizeof(int32_t);
            counts = arena.take<int32_t>(chunks * Sizes::E * kWord);
            offsets = arena.take<int32_t>(chunks * Sizes::E * kWord);
            block_expert = arena.take<int32_t>(blocks * kWord);
            sorted_slots = arena.take<int32_t>(sorted * kWord);
            inner = arena.take<T>(slots * Sizes::I * kElementBytes);
            outer = arena.take<T>(slots * Sizes::hidden * kElementBytes);
        }

        int64_t slots, chunks, blocks, sorted;
        Ptr<int32_t> counts, offsets, block_expert, sorted_slots;
        Ptr<T> inner, outer;
    };

    static void check(typename Spec::Attributes const& attributes) {
        check_format(attributes, Format::kName, Format::kGroup);
        if (attributes.activation != "silu") {
            throw Error("attribute \"activation\" is \"" + attributes.activation
                + "\", but the plugin computes \"silu\" only; run this model on ONNX Runtime");
        }
    }

    // Whatever block the chip and the tokens will choose.
    static size_t workspace(Sizes const& largest) {
        size_t bytes = 0;
        for (auto const& row : GateUp::rows()) {
            Arena arena;
            Plan(largest.T, row.constants.BLOCK_M, arena);
            bytes = std::max(bytes, arena.size());
        }
        return bytes;
    }

    static void enqueue(Call<MoeExpertsNarrowOp> const& call) {
        int64_t const block = call.kernels.template get<GateUp>(call.sizes.T).constants().BLOCK_M;
        Arena arena(call.workspace);
        Plan const plan(call.sizes.T, block, arena);
        sort_slots(call, plan, block);
        run_experts(call, plan);
    }

    static void sort_slots(Call<MoeExpertsNarrowOp> const& call, Plan const& plan, int64_t block) {
        int32_t const slots = as_i32(plan.slots);
        auto const& count = call.kernels.template get<Count>(call.sizes.T);
        auto const& offsets = call.kernels.template get<Offsets>(call.sizes.T);
        auto const& scatter = call.kernels.template get<Scatter>(call.sizes.T);
        check_alike("CHUNK", kDispatchChunk, count.constants().CHUNK);
        check_alike("CHUNK", kDispatchChunk, scatter.constants().CHUNK);
        launch(count, {ceil_div(plan.sorted, kDispatchChunk)}, call.stream, call.in.ids, plan.counts, plan.sorted_slots,
            slots, as_i32(plan.sorted));
        launch(offsets, {1}, call.stream, plan.counts, plan.offsets, plan.block_expert, as_i32(plan.chunks),
            as_i32(plan.blocks), as_i32(block));
        launch(scatter, {plan.chunks}, call.stream, call.in.ids, plan.offsets, plan.sorted_slots, slots);
    }

    static void run_experts(Call<MoeExpertsNarrowOp> const& call, Plan const& plan) {
        int64_t const tokens = call.sizes.T;
        int32_t const slots = as_i32(plan.slots);
        auto const& gate_up = call.kernels.template get<GateUp>(tokens);
        auto const& down = call.kernels.template get<Down>(tokens);
        auto const& combine = call.kernels.template get<Combine>(tokens);
        check_alike("BLOCK_M", gate_up.constants().BLOCK_M, down.constants().BLOCK_M);
        launch(gate_up, {plan.blocks * ceil_div(Sizes::I, gate_up.constants().BLOCK_N)}, call.stream, call.in.hidden,
            call.in.gate_proj, call.in.gate_proj_scale, call.in.up_proj, call.in.up_proj_scale, plan.inner,
            plan.sorted_slots, plan.block_expert, slots);
        launch(down, {plan.blocks * ceil_div(Sizes::hidden, down.constants().BLOCK_N)}, call.stream, plan.inner,
            call.in.down_proj, call.in.down_proj_scale, plan.outer, plan.sorted_slots, plan.block_expert, slots);
        launch(combine,
            {ceil_div(tokens, combine.constants().BLOCK_T), ceil_div(Sizes::hidden, combine.constants().BLOCK_D)},
            call.stream, plan.outer, call.in.weights, call.out.output, as_i32(tokens));
    }
};

}  // namespace deepseek_trt
