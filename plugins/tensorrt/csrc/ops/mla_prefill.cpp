// MlaPrefill: see plugins/kernels/mla_prefill.py for the launches and the arithmetic.
#include "checks.h"
#include "heads.h"
#include "kernel_tables.h"
#include "op_tables.h"
#include "plugin.h"

namespace deepseek_trt::mla_prefill {
namespace {

struct Op {
    using Spec = spec::MlaPrefill;
    using Sizes = Spec::Sizes;
    using Kernels = KernelSet<LatentWrite, MlaPrefillExpand, MlaPrefillAttend>;
    using All = Heads<Spec, MlaPrefillExpand, MlaPrefillAttend>;

    static void check(Spec::Attributes const&) {}

    static size_t workspace(Sizes const& largest) { return All::workspace(largest); }

    static void enqueue(Call<Op> const& call) {
        auto const& write = call.kernels.get<LatentWrite>(call.sizes.S);
        check_page(write.constants().PAGE, Sizes::page);
        launch(write, {ceil_div(call.sizes.S, write.constants().BLOCK_S), call.sizes.B}, call.stream,
            call.out.present_latent, call.in.latent, call.in.page_table, call.in.past_lengths, call.in.sequence_lengths,
            as_i32(call.sizes.S), as_i32(call.sizes.M), as_i32(call.sizes.P));
        All::launch_all(call, call.out.present_latent);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface& creator() {
    static Creator<Op> instance;
    return instance;
}

}  // namespace deepseek_trt::mla_prefill
