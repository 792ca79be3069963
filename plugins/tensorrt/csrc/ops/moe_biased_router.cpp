// MoeBiasedRouter: see plugins/kernels/moe_biased_router.py for the launch.
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"
#include "router.h"

namespace deepseek_trt::moe_biased_router {
namespace {

struct Op {
    using Spec = spec::MoeBiasedRouter;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<MoeBiasedRouter>;

    static void check(Spec::Attributes const& attributes) { check_routing<MoeBiasedRouter>(attributes); }

    static size_t workspace(Sizes const&) { return 0; }

    static void enqueue(Call<Op> const& call) {
        int64_t const tokens = call.sizes.T;
        auto const& router = call.kernels.get<MoeBiasedRouter>(tokens);
        launch(router, {ceil_div(tokens, router.constants().BLOCK_T)}, call.stream, call.in.logits,
            call.in.correction_bias, call.out.weights, call.out.ids, as_i32(tokens),
            call.attributes.routed_scaling_factor);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::moe_biased_router
