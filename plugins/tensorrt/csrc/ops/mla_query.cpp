// MlaQuery: see plugins/kernels/absorbed/query.py for the launch.
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

namespace deepseek_trt::mla_query {
namespace {

struct Op {
    using Spec = spec::MlaQuery;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MlaQuery>;

    static void check(Spec::Attributes const&) {}

    static size_t workspace(Sizes const&) { return 0; }

    static void enqueue(Call<Op> const& call) {
        int64_t const tokens = call.sizes.T;
        if (tokens != call.sizes.B * call.sizes.S) {
            throw Error("input q has " + std::to_string(tokens) + " tokens, but input cos has "
                + std::to_string(call.sizes.B) + " times " + std::to_string(call.sizes.S));
        }
        auto const& query = call.kernels.get<MlaQuery>(tokens);
        launch(query,
            {Sizes::H * ceil_div(Sizes::L, query.constants().BLOCK_L) + 1, ceil_div(tokens, query.constants().BLOCK_T)},
            call.stream, call.in.q, call.in.kv, call.in.cos, call.in.sin, call.in.latent_norm, call.in.w_uk,
            call.out.query, call.out.latent, as_i32(tokens), call.attributes.eps);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_query
