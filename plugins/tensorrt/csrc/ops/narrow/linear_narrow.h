// LinearNarrow of any format: see plugins/kernels/narrow/linear.py for the launches and the arithmetic.
#pragma once

#include "checks.h"
#include "kernel_tables.h"
#include "narrow_checks.h"
#include "op_tables.h"
#include "plugin.h"

#include <algorithm>

namespace deepseek_trt {

// Format has: Spec, Product and Sum, the generated tables of its op and kernels; kName and kGroup; check(sizes), which
// throws where codes or scales are not of the sizes that the tokens' columns ask for.
template <class Format>
struct LinearNarrowOp {
    using Spec = typename Format::Spec;
    using Sizes = typename Spec::Sizes;
    using Product = typename Format::Product;
    using Sum = typename Format::Sum;
    using Kernels = KernelSet<Product, Sum>;
    using Tile = typename Product::Constants;

    static void check(typename Spec::Attributes const& attributes) {
        check_format(attributes, Format::kName, Format::kGroup);
    }

    static int64_t blocks(Tile const& tile, Sizes const& sizes, int64_t tokens) {
        return ceil_div(sizes.out, tile.BLOCK_N) * ceil_div(tokens, tile.BLOCK_M);
    }

    static int64_t splits(Tile const& tile, Sizes const& sizes, int64_t tokens) {
        int64_t const useful = ceil_div(sizes.in, tile.BLOCK_K) / kLinearMinSteps;
        int64_t const wanted = std::min(kLinearPrograms / blocks(tile, sizes, tokens), useful);
        return std::max<int64_t>(1, std::min(wanted, kLinearMaxSplits));
    }

    static int64_t partial_bytes(Tile const& tile, Sizes const& sizes, int64_t tokens) {
        int64_t const count = splits(tile, sizes, tokens);
        return count > 1 ? count * tokens * sizes.out * static_cast<int64_t>(sizeof(float)) : 0;
    }

    // More blocks of tokens mean fewer splits: the most is needed where some number of blocks is just full.
    static size_t workspace(Sizes const& largest) {
        Format::check(largest);
        int64_t bytes = 0;
        for (auto const& row : Product::rows()) {
            Tile const& tile = row.constants;
            check_unit(tile, largest);
            for (int64_t tokens = tile.BLOCK_M;; tokens += tile.BLOCK_M) {
                int64_t const fitting = std::min(tokens, largest.T);
                bytes = std::max(bytes, fitting ? partial_bytes(tile, largest, fitting) : 0);
                if (tokens >= largest.T || splits(tile, largest, tokens) == 1) {
                    break;
                }
            }
        }
        return static_cast<size_t>(bytes);
    }

    static void check_unit(Tile const& tile, Sizes const& sizes) {
        if (sizes.in % tile.UNIT) {
            throw Error("a weight has " + std::to_string(sizes.in) + " columns, but this plugin library was made for "
                + "multiples of " + std::to_string(tile.UNIT) + "; run `deepseek-trt plugins` for this model");
        }
    }

    static void enqueue(Call<LinearNarrowOp> const& call) {
        Sizes const& sizes = call.sizes;
        if (!sizes.T) {
            return;
        }
        Format::check(sizes);
        auto const& product = call.kernels.template get<Product>(sizes.T);
        Tile const& tile = product.constants();
        check_unit(tile, sizes);
        int64_t const count = splits(tile, sizes, sizes.T);
        int32_t const tokens = as_i32(sizes.T), rows = as_i32(sizes.out);
        auto const partial = ptr<float>(call.workspace);
        launch(product, {blocks(tile, sizes, sizes.T), count}, call.stream, call.in.x, call.in.weight,
            call.in.weight_scale, call.out.output, partial, tokens, rows, as_i32(sizes.in / tile.UNIT), as_i32(count));
        if (count > 1) {
            auto const& sum = call.kernels.template get<Sum>(sizes.T);
            int64_t const size = sizes.T * sizes.out;
            launch(sum, {ceil_div(size, sum.constants().BLOCK)}, call.stream, partial, call.out.output, as_i32(size),
                as_i32(count));
        }
    }
};

}  // namespace deepseek_trt
