// MlaDecode: see plugins/kernels/mla_decode.py for the launches and the arithmetic.
#include "checks.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

#include <algorithm>

namespace deepseek_trt::mla_decode {
namespace {

struct Op {
    using Spec = spec::MlaDecode;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<LatentWrite, MlaDecodeSplit, MlaDecodeCombine>;

    struct Workspace {
        Ptr<float> partial;
        Ptr<float> partial_lse;
    };

    static void check(Spec::Attributes const& attributes) {
        check_attribute("kv_lora_rank", attributes.kv_lora_rank, Sizes::L);
    }

    // Room for `rows` = B * splits pieces of all heads.
    static Workspace lay_out(Arena& arena, int64_t rows) {
        auto partial = arena.take<float>(rows * Sizes::H * Sizes::L * int64_t{sizeof(float)});
        return {partial, arena.take<float>(rows * Sizes::H * int64_t{sizeof(float)})};
    }

    static int64_t head_tiles(MlaDecodeSplit::Constants const& tile) { return ceil_div(Sizes::H, tile.BLOCK_H); }

    // Host-known sizes only: the lengths are on the device.
    static int64_t splits(Sizes const& sizes, MlaDecodeSplit::Constants const& tile) {
        int64_t const wanted = ceil_div(kDecodePrograms, sizes.B * head_tiles(tile));
        int64_t const useful = ceil_div(sizes.M * sizes.page, int64_t{tile.MIN_TILES} * tile.BLOCK_N);
        return std::max<int64_t>(1, std::min({wanted, useful, kDecodeMaxSplits}));
    }

    // A smaller batch is cut into more splits: B * splits stays below kDecodePrograms / head_tiles + B.
    static size_t workspace(Sizes const& largest) {
        size_t bytes = 0;
        for (auto const& row : MlaDecodeSplit::rows()) {
            int64_t const rows = ceil_div(kDecodePrograms, head_tiles(row.constants)) + largest.B;
            Arena arena;
            lay_out(arena, std::min(rows, kDecodeMaxSplits * largest.B));
            bytes = std::max(bytes, arena.size());
        }
        return bytes;
    }

    static void enqueue(Call<Op> const& call) {
        int64_t const B = call.sizes.B, M = call.sizes.M, page = call.sizes.page;
        int64_t const capacity = M * page;
        auto const& write = call.kernels.get<LatentWrite>(1);
        auto const& split = call.kernels.get<MlaDecodeSplit>(capacity);
        auto const& combine = call.kernels.get<MlaDecodeCombine>(capacity);
        check_alike("BLOCK_N", split.constants().BLOCK_N, combine.constants().BLOCK_N);
        check_alike("MIN_TILES", split.constants().MIN_TILES, combine.constants().MIN_TILES);
        check_alike("MAX_SPLITS", kDecodeMaxSplits, combine.constants().MAX_SPLITS);

        int64_t const pieces = splits(call.sizes, split.constants());
        Arena arena(call.workspace);
        Workspace const w = lay_out(arena, B * pieces);

        launch(write, {ceil_div(1, write.constants().BLOCK_S), B}, call.stream, call.out.present_latent, call.in.latent,
            call.in.page_table, call.in.past_lengths, Ptr<int32_t>{}, as_i32(1), as_i32(M), as_i32(page),
            as_i32(call.sizes.P));
        launch(split, {head_tiles(split.constants()), pieces, B}, call.stream, call.in.query, call.out.present_latent,
            call.in.page_table, call.in.past_lengths, w.partial, w.partial_lse, base_2_scale(call.attributes.scale),
            as_i32(pieces), as_i32(M), as_i32(page), as_i32(call.sizes.P));
        launch(combine, {B * Sizes::H, ceil_div(Sizes::L, combine.constants().BLOCK_D)}, call.stream, w.partial,
            w.partial_lse, call.in.past_lengths, call.out.attended, as_i32(pieces), as_i32(capacity));
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_decode
