// How MlaPrefill's kernels, over a whole or a narrow cache, take heads: see plugins/kernels/mla_prefill.py.
#pragma once

#include "call.h"
#include "checks.h"
#include "kernel_tables.h"

#include <algorithm>

namespace deepseek_trt {

// Spec, Expand and Attend are the generated tables of an op and its kernels.
template <class Spec, class Expand, class Attend>
struct Heads {
    using Sizes = typename Spec::Sizes;

    Ptr<T> k_nope;
    Ptr<T> value;
    Ptr<T> k_rope;

    // Room for the expanded keys and values of `rows` = B * heads * capacity, and the rope keys of `tokens` =
    // B * capacity.
    static Heads lay_out(Arena& arena, int64_t rows, int64_t tokens) {
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

    // Launches both kernels for all heads. `pools` is what the expanding one reads.
    template <class Op, class... Pools>
    static void launch_all(Call<Op> const& call, Pools... pools) {
        int64_t const B = call.sizes.B, capacity = call.sizes.M * call.sizes.page, chunk = chunk_heads(call.sizes);
        Arena arena(call.workspace);
        Heads const w = lay_out(arena, B * chunk * capacity, B * capacity);
        for (int64_t first = 0; first < Sizes::H; first += chunk) {
            launch_heads(call, w, first, std::min(chunk, Sizes::H - first), pools...);
        }
    }

    // Heads first .. first + heads - 1.
    template <class Op, class... Pools>
    static void launch_heads(Call<Op> const& call, Heads const& w, int64_t first, int64_t heads, Pools... pools) {
        int64_t const B = call.sizes.B, S = call.sizes.S, M = call.sizes.M, page = call.sizes.page;
        int64_t const capacity = M * page;
        auto const& expand = call.kernels.template get<Expand>(capacity);
        auto const& attend = call.kernels.template get<Attend>(S);
        check_page(expand.constants().PAGE, Sizes::page);
        launch(expand, {ceil_div(capacity, expand.constants().BLOCK_T), heads, B}, call.stream, pools...,
            call.in.page_table, call.in.past_lengths, call.in.sequence_lengths, call.in.w_uk, call.in.w_uv, w.k_nope,
            w.value, w.k_rope, as_i32(first), as_i32(capacity), as_i32(M), as_i32(call.sizes.P), as_i32(S));
        launch(attend, {ceil_div(S, attend.constants().BLOCK_M), heads, B}, call.stream, call.in.query,
            call.in.past_lengths, call.in.sequence_lengths, w.k_nope, w.value, w.k_rope, call.out.attended,
            base_2_scale(call.attributes.scale), as_i32(first), as_i32(S), as_i32(capacity));
    }
};

}  // namespace deepseek_trt
