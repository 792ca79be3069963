// MlaPrefill: see plugins/kernels/mla_prefill.py for the launches and the arithmetic.
#include "checks.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

#include <algorithm>

namespace deepseek_trt::mla_prefill {
namespace {

struct Op {
    using Spec = spec::MlaPrefill;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<LatentWrite, MlaPrefillExpand, MlaPrefillAttend>;

    struct Workspace {
        Ptr<T> k_nope;
        Ptr<T> value;
        Ptr<T> k_rope;
    };

    static void check(Spec::Attributes const&) {}

    // Room for the expanded keys and values of `rows` = B * heads * capacity, and the rope keys of `tokens` =
    // B * capacity.
    static Workspace lay_out(Arena& arena, int64_t rows, int64_t tokens) {
        auto k_nope = arena.take<T>(rows * Sizes::N * kElementBytes);
        auto value = arena.take<T>(rows * Sizes::V * kElementBytes);
        return {k_nope, value, arena.take<T>(tokens * Sizes::R * kElementBytes)};
    }

    // Heads expanded at a time, so that the workspace stays within its bound.
    static int64_t chunk_heads(Sizes const& sizes) {
        int64_t const head_bytes = sizes.B * sizes.M * sizes.page * (Sizes::N + Sizes::V) * kElementBytes;
        return std::max<int64_t>(1, std::min(+Sizes::H, kPrefillWorkspace / head_bytes));
    }

    // Smaller sizes may take more heads at a time, but then stay within kPrefillWorkspace.
    static size_t workspace(Sizes const& largest) {
        int64_t const head_rows = largest.B * largest.M * largest.page;
        int64_t const bounded_rows = kPrefillWorkspace / ((Sizes::N + Sizes::V) * kElementBytes);
        Arena arena;
        lay_out(arena, std::min(head_rows * Sizes::H, std::max(bounded_rows, head_rows)), head_rows);
        return arena.size();
    }

    static void enqueue(Call<Op> const& call) {
        int64_t const B = call.sizes.B, S = call.sizes.S, M = call.sizes.M, page = call.sizes.page;
        int64_t const capacity = M * page;
        int64_t const chunk = chunk_heads(call.sizes);
        Arena arena(call.workspace);
        Workspace const w = lay_out(arena, B * chunk * capacity, B * capacity);

        auto const& write = call.kernels.get<LatentWrite>(S);
        check_page(write.constants().PAGE, Sizes::page);
        launch(write, {ceil_div(S, write.constants().BLOCK_S), B}, call.stream, call.out.present_latent, call.in.latent,
            call.in.page_table, call.in.past_lengths, call.in.sequence_lengths, as_i32(S), as_i32(M),
            as_i32(call.sizes.P));
        for (int64_t first = 0; first < Sizes::H; first += chunk) {
            launch_heads(call, w, first, std::min(chunk, Sizes::H - first));
        }
    }

    // Heads first .. first + heads - 1.
    static void launch_heads(Call<Op> const& call, Workspace const& w, int64_t first, int64_t heads) {
        int64_t const B = call.sizes.B, S = call.sizes.S, M = call.sizes.M, page = call.sizes.page;
        int64_t const capacity = M * page;
        auto const& expand = call.kernels.get<MlaPrefillExpand>(capacity);
        auto const& attend = call.kernels.get<MlaPrefillAttend>(S);
        check_page(expand.constants().PAGE, Sizes::page);
        launch(expand, {ceil_div(capacity, expand.constants().BLOCK_T), heads, B}, call.stream, call.out.present_latent,
            call.in.page_table, call.in.past_lengths, call.in.sequence_lengths, call.in.w_uk, call.in.w_uv, w.k_nope,
            w.value, w.k_rope, as_i32(first), as_i32(capacity), as_i32(M), as_i32(call.sizes.P), as_i32(S));
        launch(attend, {ceil_div(S, attend.constants().BLOCK_M), heads, B}, call.stream, call.in.query,
            call.in.past_lengths, call.in.sequence_lengths, w.k_nope, w.value, w.k_rope, call.out.attended,
            base_2_scale(call.attributes.scale), as_i32(first), as_i32(S), as_i32(capacity));
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_prefill
