// How MlaDecode's kernels, over a whole or a narrow cache, are cut into blocks: see plugins/kernels/mla_decode.py.
#pragma once

#include "call.h"
#include "checks.h"
#include "kernel_tables.h"

#include <algorithm>

namespace deepseek_trt {

// Spec, Split and Combine are the generated tables of an op and its kernels.
template <class Spec, class Split, class Combine>
struct Pieces {
    using Sizes = typename Spec::Sizes;
    using Tile = typename Split::Constants;

    Ptr<float> partial;
    Ptr<float> partial_lse;

    // Room for `rows` = slots * S results of all heads.
    static Pieces lay_out(Arena& arena, int64_t rows) {
        auto partial = arena.take<float>(rows * Sizes::H * Sizes::L * int64_t{sizeof(float)});
        return {partial, arena.take<float>(rows * Sizes::H * int64_t{sizeof(float)})};
    }

    // Of the queries of `steps` new tokens.
    static int64_t tiles(int64_t steps, Tile const& tile) { return ceil_div(steps * Sizes::H, tile.BLOCK_H); }

    // Blocks of one tile of queries, of all that run at a time.
    static int64_t programs(int64_t resident, int64_t tiles) {
        return std::max<int64_t>(1, std::min(resident, kDecodeMaxPrograms) / tiles);
    }

    // Of how many the cached tokens of `batch` sequences are cut for: launches.py's decode_parts. The lengths are on
    // the device, which cuts into at most parts + batch pieces.
    static int64_t parts(int64_t programs, int64_t batch) {
        if (4 * batch <= programs) {
            return programs - batch;
        }
        return batch <= programs ? batch * (programs / batch) : programs;
    }

    // For whatever GPU runs it: one that runs kDecodeMaxPrograms blocks at a time. Parts are at most programs.
    static size_t workspace(Sizes const& largest) {
        size_t bytes = 0;
        for (auto const& row : Split::rows()) {
            for (int64_t steps = 1; steps <= largest.S; ++steps) {
                Arena arena;
                int64_t const most = programs(kDecodeMaxPrograms, tiles(steps, row.constants));
                lay_out(arena, steps * (most + largest.B));
                bytes = std::max(bytes, arena.size());
            }
        }
        return bytes;
    }

    // Launches both kernels. `memory` is what the split takes between the query and the page table.
    template <class Op, class... Memory>
    static void launch_both(Call<Op> const& call, Memory... memory) {
        int64_t const B = call.sizes.B, S = call.sizes.S, M = call.sizes.M, page = call.sizes.page;
        int64_t const capacity = M * page;
        auto const& split = call.kernels.template get<Split>(capacity);
        auto const& combine = call.kernels.template get<Combine>(capacity);
        check_alike("BLOCK_N", split.constants().BLOCK_N, combine.constants().BLOCK_N);
        check_alike("MIN_TILES", split.constants().MIN_TILES, combine.constants().MIN_TILES);
        check_page(split.constants().PAGE, Sizes::page);
        check_alike("BLOCK_B", split.constants().BLOCK_B, combine.constants().BLOCK_B);

        int64_t const query_tiles = tiles(S, split.constants());
        int64_t const cut = parts(programs(split.resident, query_tiles), B);
        Arena arena(call.workspace);
        Pieces const w = lay_out(arena, S * (cut + B));

        launch(split, {query_tiles, cut + B}, call.stream, call.in.query, memory..., call.in.page_table,
            call.in.past_lengths, call.in.sequence_lengths, w.partial, w.partial_lse, call.out.attended,
            base_2_scale(call.attributes.scale), as_i32(B), as_i32(S), as_i32(cut), as_i32(M), as_i32(call.sizes.P));
        launch(combine, {B * S * Sizes::H, ceil_div(Sizes::L, combine.constants().BLOCK_D)}, call.stream, w.partial,
            w.partial_lse, call.in.past_lengths, call.in.sequence_lengths, call.out.attended, as_i32(B), as_i32(S),
            as_i32(cut), as_i32(capacity));
    }
};

}  // namespace deepseek_trt
